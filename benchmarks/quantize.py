"""`koala quantize` in one pass against the usual two steps, BF16 GGUF and then `llama_model_quantize`: time, peak
anonymous memory, bytes written. Each runs in a process of its own on the same random checkpoint, with the kernels
compiled before, as after the first run on a machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import RUNS
from benchmarks.table import Row

_SHAPES = {
    "160M": {"layers": 12, "hidden": 768, "heads": 12, "feed_forward": 3072, "extra_rows": 31_700},
    "1.1B": {"layers": 22, "hidden": 2048, "heads": 32, "kv_heads": 4, "feed_forward": 5632, "extra_rows": 31_700},
}


@dataclass(frozen=True, slots=True)
class _Cost:
    seconds: float
    anonymous: int  # bytes, at the peak
    written: int


def run(name: str, quick: bool) -> list[Row]:
    """Rows for one shape; with `quick` only the small one is measured."""
    if quick and name != "160M":
        return []
    from koala_local.convert.kernels.choice import kernel

    from tests.checkpoint_maker import make_hf

    folder = RUNS / f"checkpoint-{name}"
    if not (folder / "config.json").exists():
        make_hf(folder, **_SHAPES[name])  # type: ignore[arg-type]
    for type_ in ("Q4_K", "Q6_K"):
        kernel(type_, False)
    ours, theirs = _measured("one", folder), _measured("two", folder)
    goal = 4.0 if name == "1.1B" else None
    what, peer = f"quantize {name} to Q4_K_M", "BF16 GGUF, then llama_model_quantize"
    return [
        Row(f"{what}, time", ours.seconds, "s", theirs.seconds, peer, theirs.seconds / ours.seconds, goal),
        Row(f"{what}, anonymous memory", ours.anonymous / 1e6, "MB", theirs.anonymous / 1e6, peer, at_most=2000),
        Row(f"{what}, written", ours.written / 1e6, "MB", theirs.written / 1e6, peer),
    ]


def _measured(way: str, folder: Path) -> _Cost:
    out = RUNS / f"quantized-{way}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.quantize", way, str(folder), str(out)])
    anonymous = written = 0
    while process.poll() is None:
        time.sleep(0.02)
        anonymous = max(anonymous, _figure(process.pid, "status", r"RssAnon:\s+(\d+) kB") * 1024)
        written = max(written, _figure(process.pid, "io", r"wchar: (\d+)"))
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    if process.returncode:
        raise RuntimeError(f"{way} pass ended with status {process.returncode}")
    return _Cost(seconds, anonymous, written)


def _figure(pid: int, file: str, pattern: str) -> int:
    try:
        found = re.search(pattern, Path(f"/proc/{pid}/{file}").read_text())
    except OSError:  # it has just ended
        return 0
    return int(found[1]) if found else 0


def _convert(way: str, folder: Path, out: Path) -> None:
    from koala_local.convert.gguf.write import write_gguf
    from koala_local.convert.sources.checkpoint import open_checkpoint
    from koala_local.convert.vocabulary.read import read_vocabulary

    from tests.unit.convert.llama_quantize import llama_quantize

    source = open_checkpoint(folder)
    vocabulary = read_vocabulary(folder, source.config)
    if way == "one":
        write_gguf(source, vocabulary, out / "q4.gguf", "Q4_K_M")
    else:
        write_gguf(source, vocabulary, out / "bf16.gguf", "BF16")
        llama_quantize(out / "bf16.gguf", out / "q4.gguf", "Q4_K_M")


if __name__ == "__main__":
    _convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
