"""Write safetensors shards tensor by tensor, some rows at a time: what is in memory is one block of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from koala_local.disk import replacing, write_whole

from .sources.architecture import TensorInfo
from .sources.stored import ITEM_BYTES, row_blocks

SHARD_BYTES = 5 * 10**9
Blocks = Callable[[TensorInfo, slice], torch.Tensor]  # these rows of the tensor, in its type
Progress = Callable[[str, int, int], None]  # tensor, bytes done, bytes in all


def nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * ITEM_BYTES[info.dtype]


def write_sharded(
    folder: Path,
    tensors: Sequence[TensorInfo],
    read: Blocks,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the tensors, in order, to model.safetensors, or to shards of at most `shard_bytes` (or one tensor) and
    their index. Returns the weight files. Raises OSError, and whatever `read` raises."""
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total, done = sum(map(nbytes, tensors)), 0
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as partial, partial.open("wb") as file:
            file.write(_header(shard))
            for info in shard:
                _write_tensor(file, info, read)
                done += nbytes(info)
                if progress:
                    progress(info.name, done, total)
    if len(shards) > 1:
        where = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    return [folder / name for name in names]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, [(json.dumps(value, indent=2) + "\n").encode()])


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file."""
    write_whole(target, [source.read_bytes()])


def _shards(tensors: Sequence[TensorInfo], limit: int) -> Iterator[list[TensorInfo]]:
    shard: list[TensorInfo] = []
    size = 0
    for info in tensors:
        if shard and size + nbytes(info) > limit:
            yield shard
            shard, size = [], 0
        shard.append(info)
        size += nbytes(info)
    if shard:
        yield shard


def _header(shard: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in shard:
        begin, end = end, end + nbytes(info)
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, info: TensorInfo, read: Blocks) -> None:
    for rows in row_blocks(info.shape):
        file.write(read(info, rows).contiguous().flatten().view(torch.uint8).numpy().data)
