"""One safetensors file, read without trusting it. Layout: length of the header, header (JSON), data without holes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from koala_local.errors import DAMAGED, ModelFileError
from koala_local.models.json_file import parse_object

from .stored import MappedFile, Stored, in_file

_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_SHOWN = 100


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of the file, by name. Raises ModelFileError when the header does not describe the file."""
    file = MappedFile(path)
    start, header = _read_header(file)
    header.pop("__metadata__", None)
    spans = [(*_span(file.name, name, entry), name) for name, entry in header.items()]
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            how = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise ModelFileError(f"{file.name}: the tensor {name[:_SHOWN]!r} {how} (byte {begin})", DAMAGED)
        end = stop
    if start + end != len(file):
        what = f"its header describes {start + end} bytes, the file has {len(file)}"
        raise ModelFileError(f"{file.name} is {'cut off' if start + end > len(file) else 'too long'}: {what}", DAMAGED)
    return {name: _stored(file, start + begin, header[name]) for begin, _, name in spans}


def _read_header(file: MappedFile) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header."""
    length = int.from_bytes(file.data[:8], "little")
    if len(file) < 8 or length > len(file) - 8 or length > _HEADER_LIMIT:
        what = f"its header should take {length} bytes, the file has {len(file)}"
        raise ModelFileError(f"{file.name} is no safetensors file, or is cut off: {what}", DAMAGED)
    text = file.data[8 : 8 + length]
    if not text.startswith(b"{"):
        raise ModelFileError(f"{file.name} is no safetensors file: its header is no JSON object", DAMAGED)
    return 8 + length, parse_object(text, f"the header of {file.name}")


def _span(file: str, name: str, entry: Any) -> tuple[int, int]:
    """Begin and end of the tensor's bytes, counted from the start of the data."""
    where = f"{file}: the tensor {name[:_SHOWN]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(f"{where} is not described by dtype, shape and data_offsets", DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ModelFileError(f"{where} has the unknown type {str(dtype)[:_SHOWN]!r}", DAMAGED)
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise ModelFileError(f"{where} has a shape or offsets that are no list of sizes", DAMAGED)
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise ModelFileError(f"{where} should take {size} bytes, its offsets {offsets[1] - offsets[0]}", DAMAGED)
    return offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(number) is int and number >= 0 for number in value)


def _stored(file: MappedFile, offset: int, entry: dict[str, Any]) -> Stored:
    return in_file(file, offset, tuple(entry["shape"]), entry["dtype"])
