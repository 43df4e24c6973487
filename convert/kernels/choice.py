"""Which function packs a tensor: this project's kernel, on a GPU or on the processor, or ggml's own.

The kernels (blocks.py) give ggml's bytes many times faster. That is compared with the installed library before a
kernel is used, as a ggml that was built with fused multiplication has other bytes. Without triton or numba, on a
difference or on any failure ggml's function does the work, as it does for single super-blocks that a kernel leaves to
it. What numba compiles is kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from koala_local.paths import cache_folder, private_folder

from . import ggml
from .ggml import WEIGHTS

Pack = Callable[[NDArray[np.float32], str, "NDArray[np.float32] | None"], NDArray[np.uint8]]
# from super-blocks, one a row, and an importance for each column of the tensor to their bytes, and which of them are
# left to ggml
Run = Callable[[NDArray[np.float32], "NDArray[np.float32] | None"], tuple[NDArray[np.uint8], NDArray[np.bool_]]]

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q8_0")
WORTHWHILE = 2**25  # weights of a type; compiling takes longer than ggml does for fewer
# With vectors of one register: in search.improve all lanes wait while one moves a level. A fifth faster with AVX2; with
# others it was not measured.
_NARROW = {("Q3_K", False)}
_LEAST = 32  # super-blocks: what fills the lanes of every kernel
_LINE = 16  # float32 numbers in a line of the processor's cache
_SAMPLE = (16, 4096)


@dataclass(frozen=True, slots=True)
class Kernel:
    """`pack(rows, type, importance)` has `ggml.pack`'s result; `note` says what it is, and why not the other."""

    pack: Pack
    note: str


def choose_kernels(weights: Mapping[tuple[str, bool], int]) -> dict[tuple[str, bool], Kernel]:
    """The kernel for each type with and without importance matrix, of which so many weights are to be packed."""
    small = Kernel(ggml.pack, f"ggml's function: fewer than {WORTHWHILE / 1e6:.0f}M weights")
    return {key: kernel(*key) if count >= WORTHWHILE else small for key, count in weights.items() if key[0] in TYPES}


def notes_of(kernels: Mapping[tuple[str, bool], Kernel]) -> tuple[str, ...]:
    """A line for each type."""
    names = {key: f"{key[0]}{' with importance matrix' if key[1] else ''}" for key in kernels}
    return tuple(f"{names[key]}: {kernels[key].note}" for key in sorted(kernels))


@cache
def kernel(type_: str, weighted: bool) -> Kernel:
    """The kernel for `type_`, compiled, or taken from the cache, and compared with ggml's on a sample. On a GPU that
    torch sees, else on the processor."""
    reason = ""
    for place, make in (("GPU", _on_gpu), ("processor", _on_processor)):
        if place == "GPU" and (type_ == "Q8_0" or not torch.cuda.is_available()):  # Q8_0 has no search: copying is all
            continue
        try:
            run, what = make(type_, weighted)
            pack = _packer(run)
            difference = _difference(type_, pack, weighted)
        except ModuleNotFoundError as error:
            difference = f"{error.name} is not installed"
        except Exception as error:  # inner parts of others are used, which other versions may lack: all goes without
            difference = f"no kernel: {error}".splitlines()[0][:200]
        if not difference:
            return Kernel(_or_ggml(pack), f"own kernel {what}, compared with ggml's function{reason}")
        reason = f"; not on the {place}: {difference}"
    return Kernel(ggml.pack, f"ggml's function{reason}")


def _on_gpu(type_: str, weighted: bool) -> tuple[Run, str]:
    from . import cuda

    return cuda.compiled(type_, "cuda"), f"on the {torch.cuda.get_device_name()}"


def _on_processor(type_: str, weighted: bool) -> tuple[Run, str]:
    source = _source(type_, weighted)
    compiled, lanes = _compiled(type_, weighted), source.vectors.LANES

    def run(blocks: NDArray[np.float32], importance: NDArray[np.float32] | None) -> Any:
        packed = np.empty((len(blocks), ggml.row_size(type_, WEIGHTS)), np.uint8)
        irregular, scratch = np.empty(len(blocks), np.bool_), np.empty(source.SCRATCH * lanes + _LINE, np.float32)
        scratch = scratch[-scratch.ctypes.data // 4 % _LINE :]  # no register is loaded from two lines
        weights = None if importance is None else np.resize(importance, len(importance) + lanes * WEIGHTS)
        compiled(blocks.reshape(-1), weights, packed.reshape(-1).view(np.uint16), irregular, scratch)
        return packed, irregular

    names = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "neon": "NEON"}
    vectors = next((name for key, name in names.items() if source.vectors.FEATURES.get(key)), "plain")
    return run, f"with {vectors} vectors, {lanes} lanes"


@cache
def _compiled(type_: str, weighted: bool) -> Callable[..., None]:
    import numba

    source = _source(type_, weighted)
    if not source.vectors.HAS_HALVES:
        raise NotImplementedError("the processor has no instructions for float16")
    read = numba.types.Array(numba.float32, 1, "C", readonly=True)
    with _numba_cache(numba.config, f"{type_}-{weighted}-{source.vectors.LANES}") as cached:
        arguments = read, read if weighted else numba.none, numba.uint16[::1], numba.boolean[::1], numba.float32[::1]
        compiled = numba.njit(arguments, nogil=True, error_model="numpy", cache=cached)
        return cast(Callable[..., None], compiled(source.KERNELS[type_]))


def _source(type_: str, weighted: bool) -> ModuleType:
    """blocks.py, with vectors of the width that suits this use."""
    package = f"{__package__}.narrow" if (type_, weighted) in _NARROW else __package__
    return importlib.import_module(f"{package}.blocks")


@contextmanager
def _numba_cache(config: Any, use: str) -> Iterator[bool]:
    """Let numba keep what it compiles for `use` in the user's cache folder, apart for each state of the source: it
    looks only at the file of the function itself, not at what that calls, nor at how wide a vector is. False when the
    folder cannot be written."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(private_folder(cache_folder() / "kernels" / digest[:16] / use))
        yield True
    except OSError:
        yield False
    finally:
        config.CACHE_DIR = before


def _difference(type_: str, pack: Pack, weighted: bool) -> str:
    """What differs between the kernel's bytes and ggml's on the sample; empty: nothing."""
    rows = sample(*_SAMPLE)
    importance = np.random.default_rng(1).random((rows.shape[1],), np.float32) if weighted else None
    ours, theirs = pack(rows, type_, importance), ggml.pack(rows, type_, importance)
    blocks = rows.size // 256
    differing = np.count_nonzero((ours.reshape(blocks, -1) != theirs.reshape(blocks, -1)).any(1))
    return f"the kernel's bytes differ in {differing} of {blocks} sampled blocks" if differing else ""


def sample(rows: int, columns: int) -> NDArray[np.float32]:
    """Weights of many sorts: a quarter as in models, the others of all sizes, sparse, on grids, equal, with ties."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, columns // 256, 256), np.float32)
    quarter = rows // 4
    values[quarter : 2 * quarter] *= 10.0 ** random.integers(-44, 36, (quarter, columns // 256, 1))
    values[2 * quarter : 3 * quarter : 2] *= random.random(values[2 * quarter : 3 * quarter : 2].shape) < 0.05
    values[2 * quarter + 1 : 3 * quarter : 2] = np.round(values[2 * quarter + 1 : 3 * quarter : 2] * 4) / 8
    values[3 * quarter] **= 9
    values[-1] = random.integers(-2, 3, (columns // 256, 1))
    return values.reshape(rows, columns).astype(np.float32)


def _packer(run: Run) -> Pack:
    def pack(rows: NDArray[np.float32], type_: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        if rows.shape[1] % WEIGHTS or rows.size < _LEAST * WEIGHTS:
            return ggml.pack(rows, type_, importance)
        blocks = rows.reshape(-1, WEIGHTS)
        packed, irregular = run(blocks, importance)
        columns = 1 if importance is None else len(importance) // WEIGHTS
        for column in range(columns if irregular.any() else 0):  # of super-blocks, which have the same importances
            left = np.flatnonzero(irregular[column::columns]) * columns + column
            if left.size:
                part = None if importance is None else importance[column * WEIGHTS :][:WEIGHTS]
                packed[left] = ggml.pack(blocks[left], type_, part).reshape(len(left), -1)
        return packed.reshape(-1)

    return pack


def _or_ggml(pack: Pack) -> Pack:
    """`pack`, or ggml's function where a card has no memory left: other programs use it, too."""

    def either(rows: NDArray[np.float32], type_: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        try:
            return pack(rows, type_, importance)
        except torch.OutOfMemoryError:
            return ggml.pack(rows, type_, importance)

    return either
