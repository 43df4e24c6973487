"""What flash attention costs and gains on the CPU: reading a message, and decoding, behind a long history.

The engine leaves the choice to llama.cpp (`llama._flash_attention`), which takes it where it can.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from unittest import mock

import llama_cpp.llama_cpp as ll

from benchmarks.models import Model
from benchmarks.table import Row
from koala_local.engine import llama
from koala_local.engine.llama import LlamaEngine, Placement

_HISTORY, _MESSAGE, _DECODED = 3300, 40, 32


def run(model: Model, quick: bool) -> list[Row]:
    """Milliseconds without flash attention, against with it."""
    off = _times(model.path, ll.LLAMA_FLASH_ATTN_TYPE_DISABLED, 3 if quick else 7)
    on = _times(model.path, ll.LLAMA_FLASH_ATTN_TYPE_ENABLED, 3 if quick else 7)
    names = (f"read {_MESSAGE} tokens behind {_HISTORY}", f"decode a token behind {_HISTORY}")
    return [
        Row(f"{model.name}: {name}, flash attention off", without, "ms", with_it, "on", ratio=without / with_it)
        for name, without, with_it in zip(names, off, on, strict=True)
    ]


def _times(path: Path, flash: int, rounds: int) -> tuple[float, float]:
    """Medians: reading a message, decoding one token."""
    with mock.patch.object(llama, "_flash_attention", return_value=flash):
        engine = LlamaEngine(path, "benchmark", Placement(context=4096))
    engine.evaluate([7] * _HISTORY, slot=0, position=0)
    reading, decoding = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        engine.evaluate([9] * _MESSAGE, slot=0, position=_HISTORY)
        reading.append(time.perf_counter() - started)
        engine.crop(0, _HISTORY)
        started = time.perf_counter()
        for number in range(_DECODED):
            engine.evaluate((9,), slot=0, position=_HISTORY + number)
        decoding.append((time.perf_counter() - started) / _DECODED)
        engine.crop(0, _HISTORY)
    engine.close()
    return 1000 * statistics.median(reading), 1000 * statistics.median(decoding)
