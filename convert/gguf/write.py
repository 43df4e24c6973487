"""From a checkpoint to a GGUF file in one pass: read, permute, quantize, write, on all cores.

Work goes by blocks of rows through a bounded queue: workers read and pack, the caller's thread writes in file order.
What is in flight takes at most `IN_FLIGHT_BYTES`, whatever the model's size and the number of threads. On top come what
the allocator keeps for reuse (measured: up to 1 GB in all with 16 or 64 threads, 0.3 GB with 2) and mapped source
files, which the system can drop at any time.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from koala_local import wording
from koala_local.disk import FULL, nearest, replacing
from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.configuration import ModelConfig

from ..kernels import ggml
from ..kernels.choice import Kernel, choose_kernels, notes_of
from ..kernels.ggml import row_size
from ..sources.architecture import Checkpoint
from ..vocabulary.read import Vocabulary
from .kquants import BASE_TYPES, block_size, checked_importance, converted, quantize_rows
from .layout import PlannedTensor, plan_tensors, rope_notes, write_metadata

IN_FLIGHT_BYTES = 384 * 2**20
_BYTES_PER_WEIGHT = 16  # stored, as float32, permuted, packed: the most that one weight takes on its way
_LARGEST_BLOCK = 2**20  # weights


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: the tensor just written, and bytes of tensor data of the output."""

    tensor: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was written: file size in bytes, number of weights, the type of every tensor, and what is worth knowing."""

    path: Path
    kind: str
    size: int
    parameters: int
    bits_per_weight: float
    types: Mapping[str, str]
    notes: tuple[str, ...]
    kernels: tuple[str, ...] = ()  # what packed the types that take a search: "Q4_K: ..."


def write_gguf(
    source: Checkpoint,
    vocabulary: Vocabulary,
    out: Path,
    kind: str,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    check: Callable[[Path, Report], None] = lambda _, __: None,
    force: bool = False,
) -> Report:
    """Write `source` as a GGUF of type `kind` and say what was written.

    `overrides` are (pattern, type) pairs (`kquants.parse_overrides`), `importance` maps GGUF names to one weight per
    column. The file appears under its final name when it is whole and on disk, never before; `check` may look at it
    until then, and where it raises nothing is left of it. Raises as `plan_gguf`, KoalaError when the disk fills up, and
    ModelFileError for weights that cannot be written.
    """
    plan = plan_gguf(source, vocabulary, out, kind, overrides, importance=importance is not None, force=force)
    matched = _matching_importance(plan, importance or {})
    kernels = choose_kernels(_weights_by_type(plan, matched))
    with _partial_file(out) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        write_metadata(writer, source.config, vocabulary, kind, name=source.config.name or out.stem)
        size = _write_head(writer, plan, partial)
        assert writer.fout is not None
        with writer.fout[0] as file:
            pipeline = _Pipeline(source, matched, kernels, threads or os.cpu_count() or 1)
            pipeline.run(plan, file, progress)
            file.flush()
            os.fsync(file.fileno())  # here a full disk still has its own message
        notes = (*vocabulary.notes, *_notes(plan, source.config, kind, matched, importance))
        report = _report(out, kind, size, plan, notes, notes_of(kernels))
        check(partial, report)
    return report


def plan_gguf(
    source: Checkpoint,
    vocabulary: Vocabulary,
    out: Path,
    kind: str,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    importance: bool,
    force: bool = False,
) -> list[PlannedTensor]:
    """Every tensor of the output in file order, before any weight is read. Raises KoalaError for an existing output
    without `force`, a place that cannot be written to or has no room, or an unknown type, and ModelFileError for a
    checkpoint that cannot be written."""
    if out.exists() and not force:
        raise KoalaError(f"{out} exists already", "give another name with -o, or --force to replace it")
    plan = plan_tensors(source, kind, overrides, importance=importance)
    _check_rows(plan, vocabulary)
    place = nearest(out.parent)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise _no_place(out, "not a folder" if not place.is_dir() else "permission denied")
    needed, free = sum(_padded(_tensor_bytes(tensor)) for tensor in plan), shutil.disk_usage(place).free
    if needed > free:
        raise _no_space(out, f"it takes {wording.size(needed)} and {wording.size(free)} are free")
    return plan


def _check_rows(plan: Sequence[PlannedTensor], vocabulary: Vocabulary) -> None:
    rows = next(tensor.shape[0] for tensor in plan if tensor.name == "token_embd.weight")
    if rows != len(vocabulary.tokens):
        raise ModelFileError(
            f"the embedding has {rows} rows and the vocabulary {len(vocabulary.tokens)} tokens",
            "the tokenizer files belong to another model",
        )


def _matching_importance(
    plan: Sequence[PlannedTensor], importance: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """The vectors that will be used, checked before anything is written. A token embedding's is dropped where it does
    not fit, as llama.cpp does: in its files it often does not."""
    matched = {}
    for tensor in plan:
        vector = importance.get(tensor.name)
        if vector is None or len(tensor.shape) < 2:
            continue
        if tensor.name != "token_embd.weight" or vector.size == tensor.shape[-1]:
            matched[tensor.name] = checked_importance(vector, tensor.shape[-1], tensor.name)
    return matched


@contextmanager
def _partial_file(out: Path) -> Iterator[Path]:
    """What becomes `out` when the block ends, as with `replacing`; its errors as a KoalaError."""
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(replacing(out, seconds=0))
        except BlockingIOError:
            raise KoalaError(f"another run is writing {out}", "wait for it, or choose another name with -o") from None
        except OSError as error:
            raise _no_place(out, str(error.strerror)) from None
        try:
            yield partial
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise _no_space(out, str(error.strerror)) from error


def _no_place(out: Path, reason: str) -> KoalaError:
    return KoalaError(f"cannot write to {out.parent}: {reason}", "choose another place with -o")


def _no_space(out: Path, reason: str) -> KoalaError:
    return KoalaError(
        f"no space for {out.name} in {out.parent}: {reason}", "free some space, or choose another place with -o"
    )


def _write_head(writer: gguf.GGUFWriter, plan: Sequence[PlannedTensor], partial: Path) -> int:
    """Write everything before the tensors and return the size that the file will have."""
    for tensor in plan:
        number = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _tensor_bytes(tensor), number)
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.fout[0].flush()
    head = writer.fout[0].tell()
    return head + sum(_padded(_tensor_bytes(tensor)) for tensor in plan)


def _tensor_bytes(tensor: PlannedTensor) -> int:
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return rows * row_size(tensor.type, tensor.shape[-1])


def _total(plan: Sequence[PlannedTensor]) -> int:
    return sum(_tensor_bytes(tensor) for tensor in plan)


def _weights_by_type(
    plan: Sequence[PlannedTensor], importance: Mapping[str, NDArray[np.float32]]
) -> Counter[tuple[str, bool]]:
    """How many weights of each type there are, with and without importance."""
    counts: Counter[tuple[str, bool]] = Counter()
    for tensor in plan:
        counts[tensor.type, tensor.name in importance] += math.prod(tensor.shape)
    return counts


def _padded(size: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT))


@dataclass(slots=True)
class _Pipeline:
    """Blocks of rows on their way. Reading takes turns, so that a disk is read in order; packing is parallel."""

    source: Checkpoint
    importance: Mapping[str, NDArray[np.float32]]
    kernels: Mapping[tuple[str, bool], Kernel]
    threads: int

    def run(self, plan: Sequence[PlannedTensor], file: BinaryIO, progress: Callable[[Progress], None]) -> None:
        """Write the data of every tensor to `file`. On any exception no work is left running."""
        total, done = _total(plan), 0
        reading = threading.Lock()
        pool = ThreadPoolExecutor(self.threads, "quantize")
        pending: deque[tuple[PlannedTensor, slice | None, Future[NDArray[np.uint8]]]] = deque()

        def in_flight() -> int:
            return sum(_weights(tensor, rows) for tensor, rows, _ in pending) * _BYTES_PER_WEIGHT

        def write_oldest() -> None:
            nonlocal done
            tensor, rows, future = pending.popleft()
            packed = future.result()
            file.write(packed.data)
            done += packed.nbytes
            if rows is None or rows.stop == tensor.shape[0]:
                size = _tensor_bytes(tensor)
                file.write(bytes(_padded(size) - size))
            progress(Progress(tensor.name, done, total))

        try:
            for tensor in plan:
                for rows in self._blocks(tensor):
                    block = _weights(tensor, rows) * _BYTES_PER_WEIGHT
                    while pending and (len(pending) > self.threads or in_flight() + block > IN_FLIGHT_BYTES):
                        write_oldest()
                    pending.append((tensor, rows, pool.submit(self._pack, tensor, rows, reading)))
            while pending:
                write_oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _blocks(self, tensor: PlannedTensor) -> Iterator[slice | None]:
        """Slices of rows that fit the memory bound, whole heads where rows are permuted; None: all at once."""
        if len(tensor.shape) < 2:
            yield None
            return
        in_flight = self.threads + 2
        weights = min(_LARGEST_BLOCK, IN_FLIGHT_BYTES // in_flight // _BYTES_PER_WEIGHT)
        unit = tensor.shape[0] // tensor.heads if tensor.heads else 1
        step = max(1, weights // tensor.shape[1] // unit) * unit
        for start, stop in pairwise([*range(0, tensor.shape[0], step), tensor.shape[0]]):
            yield slice(start, stop)

    def _pack(self, tensor: PlannedTensor, rows: slice | None, reading: threading.Lock) -> NDArray[np.uint8]:
        if tensor.data is not None:
            weights = tensor.data
        else:
            with reading:
                stored = self.source.read(tensor.source, rows)
            weights = as_float32(stored)
        if tensor.heads:
            whole_heads = tensor.heads * weights.shape[0] // tensor.shape[0]
            weights = interleaved(weights, whole_heads)
        weights = weights.reshape(-1, weights.shape[-1])
        importance, name = self.importance.get(tensor.name), tensor.source or tensor.name
        kernel = self.kernels.get((tensor.type, importance is not None))
        return quantize_rows(weights, tensor.type, importance, name=name, pack=kernel.pack if kernel else ggml.pack)


def _weights(tensor: PlannedTensor, rows: slice | None) -> int:
    count = math.prod(tensor.shape)
    return count if rows is None else count // tensor.shape[0] * (rows.stop - rows.start)


def interleaved(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a q or k projection, from Hugging Face's rotary halves to the adjacent pairs of GGUF."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


def as_float32(stored: torch.Tensor) -> NDArray[np.float32]:
    """The same numbers in float32."""
    array: NDArray[np.float32] = (
        stored.numpy() if stored.dtype == torch.float32 else converted(stored, torch.float32).numpy()
    )
    return array


def _notes(
    plan: Sequence[PlannedTensor],
    config: ModelConfig,
    kind: str,
    matched: Mapping[str, NDArray[np.float32]],
    importance: Mapping[str, NDArray[np.float32]] | None,
) -> Iterator[str]:
    yield from rope_notes(config)
    matrices = [tensor for tensor in plan if len(tensor.shape) > 1]
    uneven = [tensor for tensor in matrices if tensor.shape[-1] % block_size(BASE_TYPES[kind])]
    if uneven:
        yield f"{len(uneven)} tensors have rows that do not divide into blocks of {kind}: they got older types"
    missing = [tensor.name for tensor in matrices if tensor.name.startswith("blk.") and tensor.name not in matched]
    if importance is not None and missing:
        yield f"the importance matrix lacks {len(missing)} of {len(matrices)} matrices: {missing[0]} .."


def _report(
    out: Path,
    kind: str,
    size: int,
    plan: Sequence[PlannedTensor],
    notes: tuple[str, ...],
    kernels: tuple[str, ...],
) -> Report:
    parameters = sum(math.prod(tensor.shape) for tensor in plan if tensor.source)
    bits = 8 * _total(plan) / parameters
    return Report(out, kind, size, parameters, bits, {tensor.name: tensor.type for tensor in plan}, notes, kernels)
