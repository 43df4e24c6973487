"""The installed library's own quantizer, and a reader of what it wrote: the yardstick of the converter's tests."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, tuple[str, bytes]]


def llama_quantize(
    source: Path,
    out: Path,
    kind: str,
    *,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> Path:
    """`llama_model_quantize`, as llama.cpp's llama-quantize calls it."""
    params = llama_cpp.llama_model_quantize_default_params()
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    params.ftype = int(gguf.LlamaFileType[file_type])
    params.nthread = 2
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, vector) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), vector.size
            entry.data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if overrides:
        rules = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for rule, (pattern, type_) in zip(rules, overrides, strict=False):
            rule.pattern, rule.type = pattern.encode(), int(gguf.GGMLQuantizationType[type_])
        params.tt_overrides = rules
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


def read_tensors(path: Path) -> Tensors:
    """Type and bytes of every tensor in a GGUF."""
    return {item.name: (item.tensor_type.name, item.data.tobytes()) for item in gguf.GGUFReader(path).tensors}


def read_types(path: Path) -> dict[str, str]:
    return {item.name: item.tensor_type.name for item in gguf.GGUFReader(path).tensors}
