"""Results: one row per measurement, written as a Markdown table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import llama_cpp.llama_cpp as ll

from koala_local.disk import write_whole
from koala_local.engine.cores import physical_cores

_HEAD = ("Measurement", "Koala", "Compared with", "Ratio", "Goal", "Met", "Notes")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. The goal is about the ratio where there is one, else about the value."""

    name: str
    measured: float | None  # None: not measured, `note` says why
    unit: str = ""
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        value = self.measured if self.ratio is None else self.ratio
        if value is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as an aligned Markdown table."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    padded = [[cell.replace("|", "/").ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _cells(row: Row) -> tuple[str, ...]:
    peer = "" if row.peer is None else f"{_number(row.peer)} {row.unit}".strip()
    limits = [f"{sign} {_number(limit)}" for sign, limit in (("≥", row.at_least), ("≤", row.at_most)) if limit]
    goal = " and ".join(limits) + (f" {row.unit}" if limits and row.ratio is None else "")
    return (
        row.name,
        "" if row.measured is None else f"{_number(row.measured)} {row.unit}".strip(),
        f"{peer}, {row.peer_name}" if peer and row.peer_name else peer or row.peer_name,
        "" if row.ratio is None else _number(row.ratio),
        goal.strip(),
        {True: "yes", False: "no", None: ""}[row.ok],
        row.note,
    )


def _number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def environment() -> dict[str, str]:
    """What the figures depend on; nothing that names a machine or a person."""
    features = re.findall(r"(\w+) = 1", ll.llama_print_system_info().decode())
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "CPU": _cpu_name(),
        "CPU cores": f"{os.cpu_count()}, {physical_cores()} threads used",
        "instruction sets llama.cpp uses": " ".join(features),
        "llama-cpp-python": version("llama-cpp-python"),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return str(names[0]) if names else platform.processor() or platform.machine()


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write results.md and results.json into `folder`."""
    facts = environment()
    lines = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    text = f"# Results of `python -m benchmarks`\n\n{lines}\n{markdown(rows)}"
    results = [{**asdict(row), "ok": row.ok} for row in rows]
    content = json.dumps({"environment": facts, "rows": results}, indent=1, ensure_ascii=False)
    for name, data in (("results.md", text), ("results.json", f"{content}\n")):
        write_whole(folder / name, [data.encode()])
