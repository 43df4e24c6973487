"""What flash attention costs and gains on the CPU: reading a message, and decoding, behind a long history. And what it
gains to fill a message up to one tile of it (engine/batch.py).

Processors differ: with AVX-512 decoding was faster with it, with AVX2 alone it took twice as long. `plain_attention` in
engine/llama.py chooses by that.
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
    """Milliseconds without flash attention, and without tiles, against with both."""
    rounds = 3 if quick else 7
    off = _times(model.path, ll.LLAMA_FLASH_ATTN_TYPE_DISABLED, rounds, tiles=False)
    untiled = _times(model.path, ll.LLAMA_FLASH_ATTN_TYPE_ENABLED, rounds, tiles=False)
    on = _times(model.path, ll.LLAMA_FLASH_ATTN_TYPE_ENABLED, rounds, tiles=True)
    names = (f"read {_MESSAGE} tokens behind {_HISTORY}", f"decode a token behind {_HISTORY}")
    rows = [
        Row(f"{model.name}: {name}, flash attention off", without, "ms", with_it, "on", ratio=without / with_it)
        for name, without, with_it in zip(names, off, on, strict=True)
    ]
    name = f"{model.name}: {names[0]}, not filled up to a tile"
    return [*rows, Row(name, untiled[0], "ms", on[0], "filled up", untiled[0] / on[0])]


def _times(path: Path, flash: int, rounds: int, *, tiles: bool) -> tuple[float, float]:
    """Medians: reading a message, decoding one token."""
    with mock.patch.object(llama, "_flash_attention", return_value=flash):
        engine = LlamaEngine(path, "benchmark", Placement(context=4096))
    engine._tiles = tiles
    engine.evaluate([7] * _HISTORY, slot=0, position=0)
    reading, decoding, step = [], [], engine.stepper(0)
    for _ in range(rounds):
        started = time.perf_counter()
        engine.evaluate([9] * _MESSAGE, slot=0, position=_HISTORY)
        reading.append(time.perf_counter() - started)
        engine.crop(0, _HISTORY)
        started = time.perf_counter()
        for number in range(_DECODED):
            step(9, _HISTORY + number)
        decoding.append((time.perf_counter() - started) / _DECODED)
        engine.crop(0, _HISTORY)
    engine.close()
    return 1000 * statistics.median(reading), 1000 * statistics.median(decoding)
