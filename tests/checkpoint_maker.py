"""Tiny LLaMA-family checkpoints with random weights, in every form that the converter reads; made in a moment."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import msgpack
import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.gguf_maker import write_settings

_TEXT = (
    "Koalas sleep in tall trees and eat eucalyptus leaves all night.",
    "The river runs to the sea, and the sea returns it as rain.",
    "One, two, three: how many birds are sitting on the wire?",
    "A conversation begins with a question and goes on with an answer.",
)
_KIND_NAMES = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}


def make_hf(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    feed_forward: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    kind: Literal["safetensors", "bin"] = "safetensors",
    rope_scaling: Mapping[str, Any] | None = None,
    extra_rows: int = 0,
    context: int = 512,
    seed: int = 0,
) -> Path:
    """Write a Hugging Face checkpoint of transformers' LLaMA to `folder`, with a SentencePiece `tokenizer.model`, and
    return the folder. The embedding has as many rows as the tokenizer has pieces, and `extra_rows` more.
    `rope_scaling` is in transformers' words, as {"rope_type": "linear", "factor": 2.0}."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model()).get_piece_size()
    config = LlamaConfig(
        vocab_size=pieces + extra_rows,
        hidden_size=hidden,
        intermediate_size=feed_forward or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **(rope_scaling or {})},
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_state(folder, random_state(config, seed), shards=shards, kind=kind)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder


def random_state(config: LlamaConfig, seed: int) -> dict[str, torch.Tensor]:
    """The state dict of a model with random weights, norms included, in the config's dtype."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    state = model.to(config.dtype).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def save_state(folder: Path, state: Mapping[str, torch.Tensor], *, shards: int = 1, kind: str = "safetensors") -> None:
    """Write the tensors as transformers names its files: one, or `shards` of them and their index."""
    stem, suffix = _KIND_NAMES[kind]
    names = list(state)
    size = -(-len(names) // shards)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {name: state[name] for name in names[shard * size : (shard + 1) * size]}
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@cache
def tokenizer_model() -> bytes:
    """A SentencePiece model as LLaMA's: BPE, byte fallback, <unk> 0, <s> 1, </s> 2; some 300 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


_META_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def make_meta(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    *,
    heads: int = 4,
    kv_heads: int = 4,
    parts: int = 1,
    split_embedding: Literal["columns", "rows"] = "columns",
    params: Mapping[str, Any] | None = None,
) -> Path:
    """Write Hugging Face's `state` as Meta would: params.json and `parts` files. Returns the folder."""
    folder.mkdir(parents=True)
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    hidden = state["model.norm.weight"].numel()
    numbers = {"dim": hidden, "n_layers": layers, "n_heads": heads, "norm_eps": 1e-6, "multiple_of": 32}
    grouped = {} if kv_heads == heads else {"n_kv_heads": kv_heads}
    (folder / "params.json").write_text(json.dumps({**numbers, "vocab_size": -1, **grouped, **(params or {})}))
    files: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.ones(8)} for _ in range(parts)]
    for name, tensor in state.items():
        short = _meta_name(name)
        columns = short.endswith(("wo.weight", "w2.weight")) or (
            short == "tok_embeddings.weight" and split_embedding == "columns"
        )
        for file, part in zip(files, _split(interleaved(name, tensor, heads, kv_heads), parts, columns), strict=True):
            file[short] = part.clone()
    for number, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{number:02}.pth")
    return folder


def _split(tensor: torch.Tensor, parts: int, columns: bool) -> Sequence[torch.Tensor]:
    return [tensor] * parts if tensor.dim() == 1 else tensor.chunk(parts, dim=int(columns))


def _meta_name(name: str) -> str:
    for there, here in _META_NAMES.items():
        name = name.replace(there, here)
    return name.removeprefix("model.")


def interleaved(name: str, tensor: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """q and k with the two halves of each head's rotary pairs side by side, as Meta, EasyLM and GGUF have them: pair
    j of a head is in rows 2j and 2j + 1, where Hugging Face has rows j and j + size / 2. Written out row by row."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    size = tensor.shape[0] // (heads if "q_proj" in name else kv_heads)
    order = [
        head + half * size // 2 + pair
        for head in range(0, tensor.shape[0], size)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return tensor[order]


def make_easylm(
    path: Path,
    state: Mapping[str, torch.Tensor],
    *,
    heads: int = 4,
    kv_heads: int = 4,
    prefix: Sequence[str] = ("params",),
    chunk_bytes: int = 2**30,
) -> Path:
    """Write Hugging Face's `state` as EasyLM's stream; arrays over `chunk_bytes` in chunks. Returns the path."""
    with path.open("wb") as file:
        for name, tensor in state.items():
            value = interleaved(name, tensor, heads, kv_heads)
            kernel = value.T.contiguous() if value.dim() == 2 and "embed" not in name else value
            file.write(msgpack.packb(([*prefix, *_easylm_key(name)], _flax_bytes(kernel, chunk_bytes))))
    return path


def _easylm_key(name: str) -> list[str]:
    outside = {
        "model.embed_tokens.weight": ["transformer", "wte", "embedding"],
        "model.norm.weight": ["transformer", "ln_f", "kernel"],
        "lm_head.weight": ["lm_head", "kernel"],
    }
    if name in outside:
        return outside[name]
    _, layer, *rest = _meta_name(name).removesuffix(".weight").split(".")
    return ["transformer", "h", layer, *rest, "kernel"]


def _flax_bytes(tensor: torch.Tensor, chunk_bytes: int) -> bytes:
    def ndarray(part: torch.Tensor) -> msgpack.ExtType:
        raw = part.contiguous().view(torch.uint8).numpy().tobytes()
        return msgpack.ExtType(1, msgpack.packb((list(part.shape), str(part.dtype).removeprefix("torch."), raw)))

    if tensor.nbytes <= chunk_bytes:
        return bytes(msgpack.packb(ndarray(tensor)))
    numbers, size = tensor.flatten(), chunk_bytes // tensor.element_size()
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    whole = {
        "__msgpack_chunked_array__": True,
        "shape": {str(number): length for number, length in enumerate(tensor.shape)},
        "chunks": {str(number): ndarray(chunk) for number, chunk in enumerate(chunks)},
    }
    return bytes(msgpack.packb(whole))


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}


def make_gguf(
    path: Path,
    state: Mapping[str, torch.Tensor],
    *,
    heads: int = 4,
    kv_heads: int = 4,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, torch.Tensor] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write Hugging Face's `state` as a GGUF without a vocabulary, matrices of type `kind`. Returns the path."""
    writer = gguf.GGUFWriter(path, architecture)
    write_settings(
        writer,
        layers=1 + max(int(name.split(".")[2]) for name in state if ".layers." in name),
        hidden=state["model.norm.weight"].numel(),
        feed_forward=state["model.layers.0.mlp.gate_proj.weight"].shape[0],
        heads=heads,
        kv_heads=kv_heads,
    )
    for name, tensor in {**state, **(extra or {})}.items():
        short = name
        for there, here in _GGUF_NAMES.items():
            short = short.replace(there, here)
        numbers = interleaved(name, tensor, heads, kv_heads).float().numpy()
        type_ = kind if numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(short, np.ascontiguousarray(gguf.quants.quantize(numbers, type_)), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
