"""Which type each tensor gets, and the kernel that packs it.

Types follow llama.cpp's mixes (`llama_model_quantize` of the installed library is the yardstick, and the tests hold
every mix against it). Packing is that library's `ggml_quantize_chunk`, or a kernel with the same bytes (kernels/).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.configuration import ModelConfig

from ..kernels import ggml
from ..kernels.choice import Pack

BASE_TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_0": "Q4_0",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
}
RECOMMENDED = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0"}
PLAIN_TYPES = ("F32", "F16", "BF16")
TENSOR_TYPES = (*dict.fromkeys(BASE_TYPES.values()), "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_PART = 2**15 - 64  # numbers
# what torch calls it, the bits of its exponent, the largest number
_SIXTEEN_BITS = {
    type_: (dtype, np.uint16(exponent), torch.finfo(dtype).max)
    for type_, dtype, exponent in (("F16", torch.float16, 0x7C00), ("BF16", torch.bfloat16, 0x7F80))
}
_BLOCK = re.compile(r"blk\.(\d+)\.")


def kind_for_bits(bits: int) -> str:
    """The recommended mix for `--bits`. Raises KoalaError for a number that has none."""
    if bits not in RECOMMENDED:
        raise KoalaError(f"no mix is known for {bits} bits", f"choose from {', '.join(map(str, RECOMMENDED))}")
    return RECOMMENDED[bits]


def checked_kind(name: str) -> str:
    """The mix of that name, as BASE_TYPES has it. Raises KoalaError for an unknown one."""
    if name.upper() not in BASE_TYPES:
        raise KoalaError(f"unknown quantization type {name!r}", f"choose from {', '.join(BASE_TYPES)}")
    return name.upper()


def parse_overrides(specifications: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """`PATTERN=TYPE` words as (pattern, type) pairs. Raises KoalaError for a bad pattern or an unknown type.

    The pattern is a regular expression, searched for anywhere in the GGUF name of a tensor (`blk.3.ffn_down.weight`),
    as llama.cpp's `--tensor-type` does, so that recipes written for it carry over.
    """
    return tuple(_parse_override(specification) for specification in specifications)


def _parse_override(specification: str) -> tuple[str, str]:
    pattern, _, type_ = specification.rpartition("=")
    if type_.upper() not in TENSOR_TYPES:
        raise KoalaError(f"unknown tensor type in {specification!r}", f"PATTERN=TYPE; types: {', '.join(TENSOR_TYPES)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise KoalaError(f"bad pattern in {specification!r}: {error}", "the pattern is a regular expression") from None
    if not pattern:
        raise KoalaError(f"no pattern in {specification!r}", "write PATTERN=TYPE, such as ffn_down=Q6_K")
    return pattern, type_.upper()


def tensor_types(
    kind: str,
    config: ModelConfig,
    tensors: Mapping[str, Sequence[int]],
    overrides: Sequence[tuple[str, str]] = (),
    *,
    importance: bool = False,
) -> dict[str, str]:
    """The type of each tensor, by GGUF name, in the order given.

    `tensors` maps GGUF names to shapes, rows first. `importance` says whether an importance matrix will be used: two
    mixes ask. The first override that matches decides; norms, biases and other vectors stay F32. Raises KoalaError for
    an unknown mix, or an override that matches nothing.
    """
    mix = _Mix(checked_kind(kind), config, tied="output.weight" not in tensors, importance=importance)
    patterns = [(re.compile(pattern), type_) for pattern, type_ in overrides]
    used: set[str] = set()
    chosen = {}
    for name in sorted(tensors, key=_model_order):
        override = next(((regex, type_) for regex, type_ in patterns if regex.search(name)), None)
        if len(tensors[name]) < 2 or not name.endswith("weight") or name.endswith("_norm.weight"):
            chosen[name] = "F32"
        elif override is not None:
            used.add(override[0].pattern)
            chosen[name] = fitting(override[1], tensors[name][-1])
        else:
            chosen[name] = fitting(mix.type_of(name, tensors[name][-1]), tensors[name][-1])
    for pattern, _ in overrides:
        if pattern not in used:
            raise KoalaError(
                f"--tensor-type {pattern!r} decides no tensor",
                "patterns match GGUF names, such as blk.0.ffn_down.weight",
            )
    return {name: chosen[name] for name in tensors}


def fitting(type_: str, columns: int) -> str:
    """`type_`, or what llama.cpp puts in its place where rows of `columns` weights do not divide into its blocks."""
    if columns % block_size(type_) == 0:
        return type_
    smaller = _FALLBACKS.get(type_, type_)
    return smaller if columns % block_size(smaller) == 0 else "F16"


def block_size(type_: str) -> int:
    """Weights per block of a type."""
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]][0])


def _model_order(name: str) -> tuple[int, str]:
    block = _BLOCK.match(name)
    return (int(block[1]) if block else -1, name)


def _more_bits(index: int, layers: int) -> bool:
    """The layers that the _M mixes give more bits: the first and last eighth, and every third between."""
    return index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2


@dataclass(slots=True)
class _Mix:
    """llama.cpp's choice, tensor after tensor in its order. It counts the tensors that it decides itself, so an
    overridden one shifts the layer number of those after it; the counters here do the same."""

    kind: str
    config: ModelConfig
    tied: bool
    importance: bool
    attention_values: int = 0
    downs: int = 0

    def type_of(self, name: str, columns: int) -> str:
        base = BASE_TYPES[self.kind]
        if base in PLAIN_TYPES:
            return base
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return self._output(base, columns)
        if "attn_v.weight" in name:
            self.attention_values += 1
            return self._attention_value(base, self.attention_values - 1)
        if "ffn_down" in name:
            self.downs += 1
            return self._down(base, self.downs - 1)
        if "attn_output.weight" in name:
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.kind, base)
        return base

    def _output(self, base: str, columns: int) -> str:
        return "Q8_0" if base == "Q8_0" or columns % block_size(base) else "Q6_K"

    def _attention_value(self, base: str, index: int) -> str:
        grouped = self.config.heads // self.config.kv_heads >= 4
        type_ = base
        match self.kind:
            case "Q2_K":
                type_ = "Q4_K" if grouped else "Q3_K"
            case "Q3_K_M":
                type_ = "Q5_K" if index < 2 else "Q4_K"
            case "Q3_K_L":
                type_ = "Q5_K"
            case "IQ4_XS" if grouped:
                type_ = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(index, self.config.layers):
                type_ = "Q6_K"
            case "Q4_K_S" if index < 4:
                type_ = "Q5_K"
        # A model of 80 layers with grouped heads is taken for Llama-2-70B, whose small attn_v can afford more bits.
        llama_70b = self.config.layers == 80 and self.config.heads != self.config.kv_heads
        return "Q5_K" if llama_70b and type_ in ("Q3_K", "Q4_K") else type_

    def _down(self, base: str, index: int) -> str:
        layers = self.config.layers
        first_eighth = index < layers // 8
        match self.kind:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if index < layers // 16 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(index, layers):
                return "Q6_K"
            case "Q4_K_S" if first_eighth:
                return "Q5_K"
            case "IQ4_XS" if first_eighth and not self.importance:
                return "Q5_K"
            case "Q4_0" if first_eighth and self.importance:
                return "Q4_1"
        return base


def quantize_rows(
    rows: NDArray[np.float32],
    type_: str,
    importance: NDArray[np.float32] | None = None,
    *,
    name: str = "tensor",
    pack: Pack = ggml.pack,
) -> NDArray[np.uint8]:
    """Pack float32 rows (n, columns) as `type_`: bytes, row after row. `importance` holds one weight per column,
    `pack` does the work for types with blocks.

    A row's bytes depend on that row alone, so a tensor may be cut anywhere between rows. Raises ModelFileError, with
    `name`, for NaN or infinite input and for values beyond F16's range.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if type_ in _SIXTEEN_BITS:
        return _sixteen_bits(rows, type_, name)
    _check_finite(rows, name)
    if type_ == "F32":
        return rows.view(np.uint8).reshape(-1)
    return _packed(rows, type_, importance, name, pack)


def _check_finite(rows: NDArray[np.float32], name: str) -> None:
    if not np.isfinite(rows).all():
        raise ModelFileError(f"{name} holds NaN or infinite weights", "the checkpoint is damaged; fetch it again")


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers as `dtype`, in parts so small that torch starts no threads of its own below every worker."""
    flat, result = source.reshape(-1), torch.empty(source.numel(), dtype=dtype)
    for start in range(0, len(flat), _PART):
        result[start : start + _PART] = flat[start : start + _PART]
    return result.view(source.shape)


def _sixteen_bits(rows: NDArray[np.float32], type_: str, name: str) -> NDArray[np.uint8]:
    dtype, exponent, largest = _SIXTEEN_BITS[type_]
    bits = converted(torch.from_numpy(rows), dtype).view(torch.int16).numpy().view(np.uint16).reshape(-1)
    if ((bits & exponent) == exponent).any():
        _check_finite(rows, name)
        raise ModelFileError(f"{name} holds weights beyond {type_}'s range ({largest:.6g})", "choose F32")
    return bits.view(np.uint8)


def _packed(
    rows: NDArray[np.float32], type_: str, importance: NDArray[np.float32] | None, name: str, pack: Pack
) -> NDArray[np.uint8]:
    columns = rows.shape[1]
    if columns % block_size(type_):
        raise ValueError(f"rows of {columns} weights do not divide into blocks of {type_}")
    if importance is not None:
        importance = checked_importance(importance, columns, name)
    packed = pack(rows, type_, importance)
    if not ggml.valid(packed, type_):
        raise ModelFileError(f"{name} cannot be packed as {type_}: the scales overflow", "choose another type for it")
    return packed


def checked_importance(importance: NDArray[np.float32], columns: int, name: str) -> NDArray[np.float32]:
    """An importance vector ready for the kernel. Raises ModelFileError where it does not fit the tensor."""
    vector = np.ascontiguousarray(importance, dtype=np.float32).reshape(-1)
    if vector.size != columns:
        raise ModelFileError(
            f"the importance matrix has {vector.size} columns for {name}, which has {columns}",
            "it was made for another model",
        )
    if not np.isfinite(vector).all():
        raise ModelFileError(f"the importance matrix for {name} holds NaN or infinite values", "make it again")
    return vector
