"""EasyLM's stream, in which Koala's weights and weight differences were published. Kernels lie transposed there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig

from .layout import FileCheckpoint, assembled
from .msgpack_index import Array, arrays
from .stored import ITEM_BYTES, MappedFile, Stored, from_raw, raw_type, rotary_halves

_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_LAYER = re.compile(r"transformer/h/(\d{1,4})/(.+)/kernel")
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention/wq": "self_attn.q_proj",
    "attention/wk": "self_attn.k_proj",
    "attention/wv": "self_attn.v_proj",
    "attention/wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward/w1": "mlp.gate_proj",
    "feed_forward/w3": "mlp.up_proj",
    "feed_forward/w2": "mlp.down_proj",
}
_OUTSIDE = {
    "transformer/wte/embedding": "model.embed_tokens",
    "transformer/ln_f/kernel": "model.norm",
    "lm_head/kernel": "lm_head",
}
# Of EasyLM's 1B, 3B, 7B, 13B, 30B and 65B, by hidden and feed-forward size
_HEAD_SIZES = {
    (2048, 5504): 128,
    (3200, 8640): 100,
    (4096, 11008): 128,
    (5120, 13824): 128,
    (6656, 17920): 128,
    (8192, 22016): 128,
}
_GROUP = 256  # rows of a kernel gathered at a time while it is transposed
_HINT = "the stream must hold the parameters of one LLaMA"


def looks_like_stream(start: bytes) -> bool:
    """Whether a file that starts so can be EasyLM's: a pair, of which the first is a list of texts."""
    return len(start) >= 3 and start[0] == 0x92 and start[1] & 0xF0 == 0x90 and start[2] & 0xE0 == 0xA0


def open_easylm(path: Path, head_size: int | None = None) -> FileCheckpoint:
    """The checkpoint in the stream. It has no configuration: sizes come from the shapes, the rest is LLaMA 1's.
    `head_size` is needed where the model is none of EasyLM's own sizes. Raises ModelFileError."""
    file = MappedFile(path)
    stored: dict[str, Stored] = {}
    for array in arrays(file, {name: ITEM_BYTES[type_] for name, type_ in _TYPES.items()}):
        name = _renamed(array.key)
        if name in stored:
            raise ModelFileError(f"{file.name} holds {name[:100]!r} twice", _HINT)
        stored[name] = _stored(file, array)
    config = _config(stored, path, head_size)
    for name in stored:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            stored[name] = rotary_halves(stored[name], config.head_size)
    description = f"{str(path)!r} (EasyLM stream, {len(file)} bytes)"
    return assembled(config, stored, tokenizer_folder=None, description=description)


def _renamed(key: tuple[str, ...]) -> str:
    """The array's name at Hugging Face; one that is not known stays as it is, and is refused later."""
    start = next((number for number, part in enumerate(key) if part != "params"), len(key))
    name = "/".join(key[start:])
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _IN_LAYER:
        return f"model.layers.{int(layer[1])}.{_IN_LAYER[layer[2]]}.weight"
    return f"{_OUTSIDE[name]}.weight" if name in _OUTSIDE else name


def _stored(file: MappedFile, array: Array) -> Stored:
    dtype = _TYPES[array.dtype]
    if len(array.shape) != 2 or array.key[-1] != "kernel":
        return Stored(array.shape, dtype, _by_rows(file, array, dtype), file.name)
    return Stored(array.shape[::-1], dtype, _by_columns(file, array, dtype), file.name)


def _by_rows(file: MappedFile, array: Array, dtype: str) -> Callable[[int, int], torch.Tensor]:
    width = int(np.prod(array.shape[1:], dtype=np.int64))

    def read(start: int, stop: int) -> torch.Tensor:
        flat = _flat(file, array, dtype, start * width, stop * width)
        return from_raw(flat.copy(), dtype).view(stop - start, *array.shape[1:])

    return read


def _by_columns(file: MappedFile, array: Array, dtype: str) -> Callable[[int, int], torch.Tensor]:
    """Rows of the transposed array. Groups of rows as they lie are looked at in turn, so that nothing is copied but
    the columns that were asked for."""
    height, width = array.shape

    def read(start: int, stop: int) -> torch.Tensor:
        out = np.empty((stop - start, height), raw_type(dtype))
        for row in range(0, height, _GROUP):
            last = min(row + _GROUP, height)
            group = _flat(file, array, dtype, row * width, last * width).reshape(last - row, width)
            out[:, row:last] = group[:, start:stop].T
        return from_raw(out, dtype)

    return read


def _flat(file: MappedFile, array: Array, dtype: str, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype]:
    """These numbers of the array in C order: a view of the file, or a copy where they lie in several chunks."""
    held, first = [], 0
    for chunk in array.chunks:
        low, high = max(start - first, 0), min(stop - first, chunk.count)
        if low < high:
            held.append(file.view(raw_type(dtype), high - low, chunk.offset + low * ITEM_BYTES[dtype]))
        first += chunk.count
    if len(held) == 1:
        return held[0]
    return np.concatenate(held) if held else np.empty(0, raw_type(dtype))


def _config(stored: Mapping[str, Stored], path: Path, head_size: int | None) -> ModelConfig:
    rows, hidden = _matrix("model.embed_tokens.weight", stored, path)
    queries, _ = _matrix("model.layers.0.self_attn.q_proj.weight", stored, path)
    keys, _ = _matrix("model.layers.0.self_attn.k_proj.weight", stored, path)
    feed_forward, _ = _matrix("model.layers.0.mlp.gate_proj.weight", stored, path)
    head_size = head_size or _HEAD_SIZES.get((hidden, feed_forward))
    if head_size is None:
        what = f"{path.name} does not say how large its attention heads are, and {hidden} wide is no size of EasyLM's"
        raise ModelFileError(what, "convert it to a Hugging Face folder first, whose config.json says it")
    if queries % head_size or keys % head_size or head_size % 2:
        what = f"{path.name}: its {queries} rows of queries and {keys} of keys are no whole heads of {head_size}"
        raise ModelFileError(what, "the stream must be of the same model as the base, or of a LLaMA")
    layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_size=rows,
        hidden_size=hidden,
        feed_forward_size=feed_forward,
        layers=len(layers),
        heads=queries // head_size,
        kv_heads=keys // head_size,
        head_size=head_size,
        norm_epsilon=1e-6,
        rope_base=10000.0,
        context=2048,
        tied_embeddings="lm_head.weight" not in stored,
        bos=1,
        eos=(2,),
        name=path.name,
    )


def _matrix(name: str, stored: Mapping[str, Stored], path: Path) -> tuple[int, int]:
    """The shape of a matrix that the sizes of the model are taken from."""
    if name not in stored or len(stored[name].shape) != 2:
        raise ModelFileError(f"{path.name} has no {name}", _HINT)
    return stored[name].shape[0], stored[name].shape[1]
