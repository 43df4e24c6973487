"""What safetensors files say of their tensors, read without torch: eight bytes with a length, then JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from koala_local.errors import DAMAGED, ModelFileError
from koala_local.models.json_file import member, parse_object

_LIMIT = 100 << 20  # bytes; the format's own limit
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor; `size` in bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    size: int


def read_folder(folder: Path) -> list[Entry]:
    """The tensors of all safetensors files in `folder`. Raises ModelFileError."""
    paths = [member(folder, path.name) for path in sorted(folder.glob("*.safetensors"))]
    if not paths:
        raise ModelFileError(f"{str(folder)!r} holds no safetensors file", "give the folder of a GPTQ model")
    return [entry for path in paths for entry in _read(path)]


def _read(path: Path) -> list[Entry]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size
            if not 2 <= length <= min(_LIMIT, total - 8):
                raise ModelFileError(f"{path.name} is no whole safetensors file", DAMAGED)
            content = parse_object(file.read(length), path.name)
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} cannot be read: {error.strerror}", "check the folder") from None
    room = total - 8 - length
    return [_entry(path, name, value, room) for name, value in content.items() if name != "__metadata__"]


def _entry(path: Path, name: str, value: Any, room: int) -> Entry:
    parts = value if isinstance(value, dict) else {}
    kind, shape, offsets = parts.get("dtype"), parts.get("shape"), parts.get("data_offsets")
    if isinstance(kind, str) and kind in _BITS and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2:
        size = math.prod(shape) * _BITS[kind] // 8
        if offsets[1] <= room and offsets[1] - offsets[0] == size:
            return Entry(name, kind, tuple(shape), size)
    raise ModelFileError(f"{path.name}: the entry of tensor {name[:80]!r} does not fit the file", DAMAGED)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
