"""Run the measurements, print one table, and write it to benchmarks/results.md and results.json.

    python -m benchmarks                            all, about 35 minutes on two quiet cores
    python -m benchmarks --quick                    all, short: not for quoting
    python -m benchmarks --only decode --only turns
The last two write to runs/benchmarks/ instead, and so does the first until it is through without a failure. A
measurement that fails is a row that says why; the others are made all the same.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import (
    attention,
    data,
    decode,
    finetune,
    gptq,
    kernels,
    memory,
    overflow,
    quantize,
    resume,
    startup,
    turns,
)
from benchmarks.models import LLAMA_160M, RUNS, Model, random_model, silence
from benchmarks.table import Row, markdown, write
from koala_local.nano import MODEL_PATH
from koala_local.wording import first_line

_NAMES = (
    "attention",
    "decode",
    "turns",
    "resume",
    "overflow",
    "startup",
    "memory",
    "data",
    "finetune",
    "quantize",
    "gptq",
)
_Job = tuple[str, str, Callable[[], list[Row]]]  # name, what of it, the measurement


def main() -> int:
    """The exit status: 1 when a goal was not met, 2 when a measurement failed."""
    options = _parser().parse_args()
    quick, only = options.quick, options.only or list(_NAMES)
    silence()
    print("making the random model, unless it is there", file=sys.stderr)
    models = [Model("160M", random_model(LLAMA_160M)), Model("bundled", MODEL_PATH)]
    rows: list[Row] = []
    failed = 0
    for name, part, measure in _jobs(models, quick):
        if name not in only:
            continue
        print(f"{name}: {part}", file=sys.stderr)
        try:
            rows += measure()
        except Exception as error:  # whatever it is: what the others took half an hour for is not lost
            traceback.print_exc()
            rows.append(Row(f"{name}: {part}", None, note=f"failed: {first_line(error)}"))
            failed += 1
        write(RUNS, rows)
    print(markdown(rows), end="")
    if failed:
        return 2
    if not quick and set(only) == set(_NAMES):
        write(Path(__file__).parent, rows)
    return int(any(row.ok is False for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Koala against its peers.")
    parser.add_argument("--quick", action="store_true", help="short runs; not for quoting")
    parser.add_argument("--only", action="append", choices=_NAMES, help="one measurement; may be given several times")
    return parser


def _jobs(models: list[Model], quick: bool) -> list[_Job]:
    jobs: list[_Job] = [
        (module.__name__.rpartition(".")[2], model.name, partial(module.run, model, quick))
        for module in (attention, decode, turns, resume)
        for model in models
    ]
    jobs.append(("overflow", "bundled", partial(overflow.run, models[-1], quick)))
    jobs.append(("startup", "koala --help", partial(startup.run_help, quick)))
    jobs += [("startup", model.name, partial(startup.run, model, quick)) for model in models]
    jobs.append(("memory", "the plan against the peak", partial(memory.run, quick)))
    jobs.append(("data", "build and tokens", partial(data.run, quick)))
    jobs.append(("finetune", "a tiny LLaMA", partial(finetune.run, quick)))
    jobs.append(("quantize", "kernels", partial(kernels.run, quick)))
    jobs.append(("gptq", "one layer", partial(gptq.run, quick)))
    return jobs + [("quantize", shape, partial(quantize.run, shape, quick)) for shape in ("160M", "1.1B")]


if __name__ == "__main__":
    sys.exit(main())
