"""The quantizer of the installed llama.cpp: functions of its `libggml-base`, called through ctypes, which releases the
interpreter lock, so that threads add up."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from koala_local.errors import KoalaError

WEIGHTS = int(gguf.QK_K)  # of a super-block


def row_size(type_: str, columns: int) -> int:
    """Bytes of a row of `columns` weights, which must divide into blocks."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return int(columns // weights * size)


def pack(rows: NDArray[np.float32], type_: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """`ggml_quantize_chunk` of contiguous rows that divide into blocks."""
    count, columns = rows.shape
    packed = np.empty(count * row_size(type_, columns), dtype=np.uint8)
    weights = None if importance is None else importance.ctypes.data
    arguments = (_number(type_), rows.ctypes.data, packed.ctypes.data, 0, count, columns, weights)
    written = _library().ggml_quantize_chunk(*arguments)
    if written != packed.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {type_}, not {packed.nbytes}")
    return packed


def valid(packed: NDArray[np.uint8], type_: str) -> bool:
    """Whether every scale in packed rows is a finite number."""
    return bool(_library().ggml_validate_row_data(_number(type_), packed.ctypes.data, packed.nbytes))


def _number(type_: str) -> int:
    return int(gguf.GGMLQuantizationType[type_])


@cache
def _library() -> ctypes.CDLL:
    """The libggml-base that llama-cpp-python installed. Raises KoalaError where there is none."""
    specification = importlib.util.find_spec("llama_cpp")
    folder = Path(specification.origin).parent / "lib" if specification and specification.origin else None
    found = (
        [file for file in sorted(folder.glob("*ggml-base.*")) if file.suffix in (".so", ".dylib", ".dll")]
        if folder
        else []
    )
    if not found:
        raise KoalaError("llama-cpp-python's ggml library was not found", "install llama-cpp-python again")
    library = ctypes.CDLL(str(found[0]))
    pointer = ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer,
    ]  # fmt: skip
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library
