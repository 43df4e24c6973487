"""Meta's own checkpoints: params.json and consolidated.00.pth, .01.pth, .., each a part of every tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig, Settings
from koala_local.models.json_file import read_object

from .layout import FileCheckpoint, assembled
from .pickled import open_pickled
from .stored import Stored, rotary_halves, stacked_columns, stacked_rows

_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_LAYER = re.compile(r"layers\.(\d{1,4})\.(.+)")
_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SPLIT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def open_meta(folder: Path) -> FileCheckpoint:
    """The checkpoint in the folder, all its parts merged. Raises ModelFileError."""
    params = Settings(read_object(folder / "params.json"), repr(str(folder / "params.json")))
    paths = _parts(folder)
    files = [open_pickled(path) for path in paths]
    names = [name for name in dict.fromkeys(chain(*files)) if not name.endswith("rope.freqs")]
    merged = {name: _merged(name, [_part(name, file, path) for file, path in zip(files, paths, strict=True)], params)
              for name in names}  # fmt: skip
    config = _config(params, merged, folder)
    stored = {_renamed(name): tensor for name, tensor in merged.items()}
    for name in stored:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            stored[name] = rotary_halves(stored[name], config.head_size)
    size = sum(path.stat().st_size for path in paths)
    description = f"{str(folder)!r} (Meta, {len(paths)} part{'s'[: len(paths) > 1]}, {size} bytes)"
    return assembled(config, stored, tokenizer_folder=_tokenizer_folder(folder), description=description)


def _parts(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01.pth and so on, none left out."""
    paths = sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))
    for number in range(len(paths)):
        name = f"consolidated.{number:02}.pth"
        if paths[number].name != name:
            raise ModelFileError(f"{name} is missing from {str(folder)!r}", "download that file too")
    return paths


def _part(name: str, file: Mapping[str, Stored], path: Path) -> Stored:
    if name not in file:
        raise ModelFileError(f"the tensor {name[:100]!r} is missing from {path.name}", "get that file again")
    return file[name]


def _merged(name: str, parts: Sequence[Stored], params: Settings) -> Stored:
    """The whole tensor: layers split by output are stacked by rows, those split by input by columns. The embedding is
    split by columns in LLaMA 1 and 2, by rows in LLaMA 3."""
    if len(parts[0].shape) < 2:  # norms: every part has all of it
        return parts[0]
    columns = name.endswith(_SPLIT_BY_COLUMNS)
    if name == "tok_embeddings.weight":
        columns = parts[0].shape[1] != params.count("dim")
    return stacked_columns(parts) if columns else stacked_rows(parts)


def _renamed(name: str) -> str:
    """The tensor's name at Hugging Face; one that is not known stays as it is, and is refused later."""
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _IN_LAYER:
        return f"model.layers.{int(layer[1])}.{_IN_LAYER[layer[2]]}"
    return _OUTSIDE.get(name, name)


def _config(params: Settings, merged: Mapping[str, Stored], folder: Path) -> ModelConfig:
    """What params.json says, and the shapes where it does not: the vocabulary can be -1, the FFN size is not there."""
    hidden, heads = params.count("dim"), params.count("n_heads")
    kv_heads = params.count("n_kv_heads", heads)
    if hidden % heads or heads % kv_heads or hidden // heads % 2:
        raise params.fail("n_heads")
    given = params.values.get("vocab_size", -1)
    rope_base = params.number("rope_theta", 10000.0)
    epsilon = params.number("norm_eps", 1e-6)
    scaling = _scaling(hidden) if params.flag("use_scaled_rope") else {}
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_size=_rows("tok_embeddings.weight", merged) if given == -1 else params.count("vocab_size"),
        hidden_size=hidden,
        feed_forward_size=_rows("layers.0.feed_forward.w1.weight", merged),
        layers=params.count("n_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=hidden // heads,
        norm_epsilon=epsilon,
        rope_base=rope_base,
        context=131072 if scaling else _context(rope_base, epsilon),
        tied_embeddings="output.weight" not in merged,
        rope_scaling=scaling,
        bos=None if rope_base == 500000.0 else 1,
        eos=() if rope_base == 500000.0 else (2,),
        name=folder.absolute().name,
    )


def _rows(name: str, merged: Mapping[str, Stored]) -> int:
    if name not in merged or not merged[name].shape:
        raise ModelFileError(f"the tensor {name} is missing from the consolidated files", "get all files again")
    return merged[name].shape[0]


def _context(rope_base: float, epsilon: float) -> int:
    """The trained length, which params.json does not hold, by what sets the generations apart."""
    by_base = {500000.0: 8192, 1000000.0: 16384}  # LLaMA 3, Code Llama
    return by_base.get(rope_base, 4096 if epsilon == 1e-5 else 2048)  # LLaMA 2, LLaMA 1


def _scaling(hidden: int) -> dict[str, Any]:
    """LLaMA 3.1's scaling, whose numbers are in Meta's code only; the small models of 3.2 have another factor."""
    trained = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": 32.0 if hidden < 4096 else 8.0, **trained}


def _tokenizer_folder(folder: Path) -> Path | None:
    """The folder itself, or the one above, where the first LLaMA has it."""
    return next((place for place in (folder, folder.absolute().parent) if (place / "tokenizer.model").exists()), None)
