"""A tensor that lies in a file: its shape, its type, and a way to read some of its rows."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from koala_local.errors import DAMAGED, ModelFileError

BLOCK_BYTES = 16 << 20  # what is read of a large tensor at a time

TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {type_: name for name, type_ in TORCH_TYPES.items()}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_RAW: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<u4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
}  # numpy has no BF16

Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """`read(start, stop)` returns these rows as a tensor with memory of its own; `origin` names the file."""

    shape: tuple[int, ...]
    dtype: str
    read: Rows
    origin: str


class MappedFile:
    """A file mapped read-only. The mapping lives as long as something read from it refers to it."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError when the file is missing, empty or unreadable."""
        self.name = path.name
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelFileError(f"{str(path)!r} is missing", "check the path, or download it again") from None
        except ValueError:
            raise ModelFileError(f"{str(path)!r} is empty", DAMAGED) from None
        except OSError as error:
            raise ModelFileError(f"{str(path)!r} cannot be read: {error.strerror}", "check its permissions") from None

    def __len__(self) -> int:
        return len(self.data)

    def view(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[Any]:
        """`count` numbers as they lie in the file, not copied and not to be written to."""
        return np.frombuffer(self.data, dtype, count, offset)

    def release(self, offset: int, size: int) -> None:
        """These bytes were copied: they need not count as this process's memory. Read again, they come back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, start, offset + size - start)


def in_file(file: MappedFile, offset: int, shape: tuple[int, ...], dtype: str) -> Stored:
    """A tensor that lies row by row from byte `offset` on; the caller has checked that it lies inside the file."""
    row = math.prod(shape[1:])

    def read(start: int, stop: int) -> torch.Tensor:
        first, count = offset + start * row * ITEM_BYTES[dtype], (stop - start) * row
        raw = file.view(_RAW[dtype], count, first).copy()
        file.release(first, raw.nbytes)
        return from_raw(raw, dtype).view(stop - start, *shape[1:])

    return Stored(shape, dtype, read, file.name)


def from_raw(raw: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """Unsigned integers of the type's width, taken as numbers of the type. Shares their memory."""
    return torch.from_numpy(raw.view(f"i{raw.itemsize}")).view(TORCH_TYPES[dtype])


def raw_type(dtype: str) -> np.dtype[Any]:
    """numpy's unsigned integer of the type's width."""
    return _RAW[dtype]


def stacked_rows(parts: Sequence[Stored]) -> Stored:
    """The parts one below the other."""
    first = _alike(parts)
    height = first.shape[0]

    def read(start: int, stop: int) -> torch.Tensor:
        held = [
            part.read(max(start - height * number, 0), min(stop - height * number, height))
            for number, part in enumerate(parts)
            if start < height * (number + 1) and stop > height * number
        ]
        return torch.cat(held) if held else first.read(0, 0)

    return first if len(parts) == 1 else replace(first, shape=(height * len(parts), *first.shape[1:]), read=read)


def stacked_columns(parts: Sequence[Stored]) -> Stored:
    """The parts side by side."""
    first = _alike(parts)

    def read(start: int, stop: int) -> torch.Tensor:
        return torch.cat([part.read(start, stop) for part in parts], dim=1)

    return first if len(parts) == 1 else replace(first, shape=(first.shape[0], first.shape[1] * len(parts)), read=read)


def _alike(parts: Sequence[Stored]) -> Stored:
    """The first of the parts. Raises ModelFileError unless all are of one shape and type."""
    for part in parts:
        if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
            what = f"{parts[0].origin} has {parts[0].dtype} {parts[0].shape}, {part.origin} {part.dtype} {part.shape}"
            raise ModelFileError(f"parts of one tensor differ: {what}", "the files must be of one model: get all again")
    return parts[0]


def rotary_halves(stored: Stored, head_size: int) -> Stored:
    """q or k of a file that interleaves the two halves of each head (Meta, GGUF), in Hugging Face's order of rows."""

    def read(start: int, stop: int) -> torch.Tensor:
        first = start // head_size * head_size
        last = -(-stop // head_size) * head_size
        heads = stored.read(first, last).view(-1, head_size // 2, 2, stored.shape[1])
        return heads.transpose(1, 2).flatten(0, 2)[start - first : stop - first].clone()

    whole = len(stored.shape) == 2 and head_size > 0 and head_size % 2 == 0 and stored.shape[0] % head_size == 0
    return replace(stored, read=read) if whole else stored  # a wrong shape is refused later, by name


def row_blocks(shape: Sequence[int], bytes_per_item: int = 4, limit: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices over the first dimension, each of at most `limit` bytes, or of one row."""
    rows = max(1, limit // max(1, math.prod(shape[1:]) * bytes_per_item))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
