"""The quantizing kernels against `ggml_quantize_chunk`: on one thread and on two, with and without importance matrix,
and how long the first use takes with the compiled kernel in the cache. Both take turns on the same weights. So do the
types without a search, all checks of the weights included, and numpy's copying of as many.

    python -m benchmarks.kernels    # these alone
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
from koala_local.convert.gguf.kquants import quantize_rows
from koala_local.convert.kernels import choice, ggml

from benchmarks.table import Row, markdown

_GOALS = {"Q4_K": 8.0, "Q6_K": 6.0, "Q5_K": 5.0, "Q3_K": 5.0}
_WEIGHTED_GOAL = 6.0
_ROWS, _COLUMNS = 256, 4096  # the blocks that the converter packs
_BLOCKS = 4  # for each thread: the converter's threads are not woken for a single one
_REPEATS = 5
_FIRST = (
    "import sys; sys.modules['scipy'] = None\n"
    "import time, numba; from koala_local.convert.kernels import choice; started = time.perf_counter()\n"
    "choice.kernel('Q4_K', False)\n"
    "sys.stdout.write(str(time.perf_counter() - started))"
)


def run(quick: bool) -> list[Row]:
    """Rows for every type that has a kernel; with `quick` for Q4_K."""
    types = ("Q4_K",) if quick else choice.TYPES
    threads = (1,) if quick else (1, 2)
    modes = [(type_, weighted) for type_ in types for weighted in (False, True) if type_ != "Q8_0" or not weighted]
    rows = [_compared(*mode, count) for mode in modes for count in threads]
    return [*rows, *(_without_search(type_) for type_ in ("F16", "BF16", "Q8_0")), _first_use()]


def _compared(type_: str, weighted: bool, threads: int) -> Row:
    name = f"pack {type_}{', importance matrix' if weighted else ''}, {threads} thread{'s' * (threads > 1)}"
    kernel = choice.kernel(type_, weighted)
    random = np.random.default_rng(0)
    parts = [random.standard_normal((_ROWS, _COLUMNS), np.float32) for _ in range(_BLOCKS * threads)]
    importance = random.random(_COLUMNS, np.float32) if weighted else None
    ours, theirs = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            ours.append(_seconds(pool, kernel.pack, parts, type_, importance))
            theirs.append(_seconds(pool, ggml.pack, parts, type_, importance))
    weights = sum(part.size for part in parts) / 1e6
    goal = _WEIGHTED_GOAL if weighted else _GOALS.get(type_)
    speed, peer = weights / median(ours), weights / median(theirs)
    return Row(name, speed, "M/s", peer, "ggml_quantize_chunk", speed / peer, at_least=goal, note=kernel.note)


def _without_search(type_: str) -> Row:
    """Bytes of float32 weights a second, beside what numpy copies."""
    random = np.random.default_rng(0)
    parts = [random.standard_normal((_ROWS, _COLUMNS), np.float32) for _ in range(_BLOCKS)]
    pack = choice.kernel(type_, False).pack if type_ in choice.TYPES else ggml.pack
    ours, copies = [], []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(_REPEATS):
            ours.append(_seconds(pool, lambda part, *_: quantize_rows(part, type_, pack=pack), parts, type_, None))
            copies.append(_seconds(pool, lambda part, *_: part.copy(), parts, type_, None))
    size = sum(part.nbytes for part in parts) / 1e9
    speed, peer = size / median(ours), size / median(copies)
    return Row(f"pack {type_}, checked", speed, "GB/s", peer, "a copy by numpy", speed / peer)


def _seconds(pool: ThreadPoolExecutor, pack: Any, parts: list[Any], type_: str, importance: Any) -> float:
    started = time.perf_counter()
    list(pool.map(lambda part: pack(part, type_, importance), parts))
    return time.perf_counter() - started


def _first_use() -> Row:
    """In a new process, numba's own start included; the process before has filled the cache. Without scipy, which the
    converter does not need and numba imports where training has brought it."""
    command = [sys.executable, "-c", _FIRST]
    choice.kernel("Q4_K", False)
    seconds = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(_REPEATS)]
    return Row(
        "first use of a kernel from the cache",
        median(seconds),
        "s",
        at_most=0.5,
        note="after `import numba`, without scipy; comparing with ggml included",
    )


if __name__ == "__main__":
    sys.stdout.write(markdown(run(quick=False)))
