"""The importance matrix: how large each input column of each matrix is, on average, over a calibration text.

Quantizers weigh a column's rounding errors by it. It is collected with the layer-streamed forward, or read from a file
that llama.cpp's `llama-imatrix` wrote: GGUF (`<tensor>.in_sum2` over `<tensor>.counts`) or the older binary `.dat`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.file_kind import is_gguf
from koala_local.models.gguf_header import Tensor, read_header

from .forward import INPUTS, Compute, Observe, Progress, stream_layers
from .sources.architecture import Checkpoint
from .sources.gguf_names import gguf_name

_HINT = "make it again with llama-imatrix, or pass --calibration FILE instead"
_ENTRIES = 100_000  # more than any model has tensors
_NAME = 1024  # bytes of a tensor's name


def importance_matrix(
    checkpoint: Checkpoint,
    batches: Sequence[torch.Tensor],
    progress: Progress | None = None,
    *,
    compute: Compute | None = None,
    folder: Path | None = None,
) -> dict[str, NDArray[np.float32]]:
    """The mean of squared inputs of every column of every matrix in the decoder layers, over all tokens of `batches`
    (ids, (batch, tokens) each). Raises KoalaError when they are not finite."""
    tokens = sum(ids.numel() for ids in batches)
    if not tokens:
        raise KoalaError("the calibration text has no tokens", "give a longer text")
    sums: dict[str, torch.Tensor] = {}

    def observer(index: int) -> Observe:
        def observe(group: str, x: torch.Tensor) -> None:
            squares = x.float().square().sum(0, dtype=torch.float64).cpu()
            key = f"{index} {group}"
            sums[key] = sums[key] + squares if key in sums else squares

        return observe

    stream_layers(checkpoint, batches, observer, progress, compute=compute, folder=folder)
    means = {key: (total / tokens).float().numpy() for key, total in sums.items()}
    return {name: means[key] for key in means for name in _names(key, means[key])}


def _names(key: str, mean: NDArray[np.float32]) -> list[str]:
    """The GGUF names of the matrices that a sum belongs to."""
    index, group = key.split()
    if not np.isfinite(mean).all():
        raise KoalaError(
            f"the activations of layer {index} are not finite numbers: the checkpoint is broken",
            "download the checkpoint again",
        )
    return [gguf_name(f"model.layers.{index}.{name}.weight") for name in INPUTS[group]]


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """The matrix in a file of llama.cpp, as `importance_matrix` returns it. Raises ModelFileError."""
    try:
        if not is_gguf(path):
            with path.open("rb") as file:
                return _read_legacy(path, file)
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} cannot be read: {error.strerror}", _HINT) from None
    return _read_gguf(path)


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    if not names:
        raise ModelFileError(f"{str(path)!r} is a GGUF without an importance matrix", _HINT)
    result = {}
    with path.open("rb") as file:
        for name in names:
            if f"{name}.counts" not in tensors:
                raise ModelFileError(f"{str(path)!r}: {name[:80]!r} has sums but no counts", _HINT)
            counts = _floats(path, file, tensors[f"{name}.counts"])
            sums = _floats(path, file, tensors[f"{name}.in_sum2"])
            result[name] = _mean(path, name, sums, counts)
    return result


def _floats(path: Path, file: BinaryIO, tensor: Tensor) -> NDArray[np.float32]:
    if tensor.type != "F32" or tensor.size != 4 * math.prod(tensor.shape):
        raise ModelFileError(f"{str(path)!r}: {tensor.name[:80]!r} is {tensor.type} where F32 is expected", _HINT)
    file.seek(tensor.offset)
    return np.frombuffer(file.read(tensor.size), "<f4").astype(np.float32)


def _mean(path: Path, name: str, sums: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over counts, one count for each equal part (an expert) of the sums; what was never used weighs 1."""
    if not counts.size or sums.size % counts.size:
        raise ModelFileError(f"{str(path)!r}: {name[:80]!r} has {sums.size} sums for {counts.size} counts", _HINT)
    parts = sums.reshape(counts.size, -1)
    used = counts[:, None] > 0
    mean = np.where(used, parts / np.where(used, counts[:, None], 1), np.float32(1)).reshape(-1).astype(np.float32)
    return _checked(path, name, mean)


def _read_legacy(path: Path, file: BinaryIO) -> dict[str, NDArray[np.float32]]:
    """Little-endian int32 count; per entry: name (length, bytes), calls, number of values, values (mean x calls)."""
    size = path.stat().st_size
    entries = _integer(path, file, "the number of entries", 1, _ENTRIES)
    result = {}
    for _ in range(entries):
        length = _integer(path, file, "the length of a name", 1, _NAME)
        name = _bytes(path, file, length).decode("utf-8", "replace").rstrip("\0")
        calls = _integer(path, file, "a number of calls", 0, 2**31 - 1)
        columns = _integer(path, file, f"the size of {name[:80]!r}", 1, (size - file.tell()) // 4)
        values = np.frombuffer(_bytes(path, file, 4 * columns), "<f4").astype(np.float32)
        result[name] = _checked(path, name, values / np.float32(max(calls, 1)))
    return result


def _bytes(path: Path, file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ModelFileError(f"{str(path)!r} ends in the middle of an entry", _HINT)
    return data


def _integer(path: Path, file: BinaryIO, what: str, least: int, most: int) -> int:
    value: int = struct.unpack("<i", _bytes(path, file, 4))[0]
    if not least <= value <= most:
        raise ModelFileError(f"{str(path)!r} is no importance matrix, or damaged: {what} cannot be {value}", _HINT)
    return value


def _checked(path: Path, name: str, mean: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(mean).all() or (mean < 0).any():
        raise ModelFileError(f"{str(path)!r}: {name[:80]!r} holds values that are no mean of squares", _HINT)
    return mean
