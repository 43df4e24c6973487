"""The report as pictures: counts beside the published ones, lengths, and what was left out."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .mix import REASONS

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures into the folder and return their paths."""
    made = {"counts.png": _counts, "lengths.png": _lengths, "removed.png": _removed}
    return [_write(folder / name, draw, report) for name, draw in made.items()]


def _counts(axes: Axes, report: Mapping[str, Any]) -> None:
    sources = report["sources"].values()
    places = list(range(len(sources)))
    for shift, key, label in ((-0.2, "published", "published"), (0.2, "kept", "in this mix")):
        bars = axes.barh([place + shift for place in places], [each[key] for each in sources], 0.38, label=label)
        axes.bar_label(bars, labels=[f"{each[key]:,}" if each[key] else "" for each in sources], padding=3, fontsize=8)
    axes.set_yticks(places, [each["title"] for each in sources])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("examples")
    axes.legend()


def _lengths(axes: Axes, report: Mapping[str, Any]) -> None:
    edges = report["length_edges"]
    bottom = [0] * len(edges)
    for number, each in enumerate(report["sources"].values()):
        counts = each["lengths"]["histogram"]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.bar(range(len(edges)), counts, 0.9, bottom, label=each["title"], color=colour, alpha=1 - number // 7 / 2)
        bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
    axes.set_xticks(range(len(edges)), [f"{edge:,}+" for edge in edges], rotation=45)
    axes.set_xlabel("tokens of a dialogue")
    axes.set_ylabel("examples")
    if report["sources"]:
        axes.legend(fontsize=8)


def _removed(axes: Axes, report: Mapping[str, Any]) -> None:
    sources = list(report["sources"].values())
    left = [0] * len(sources)
    counted = [("unusable row", [sum(each["skipped"].values()) for each in sources])]
    counted += [(reason, [each["removed"][reason] for each in sources]) for reason in REASONS]
    for number, (label, counts) in enumerate(counted):
        axes.barh(range(len(sources)), counts, 0.7, left, label=label, color=_COLOURS[number])
        left = [low + count for low, count in zip(left, counts, strict=True)]
    axes.set_yticks(range(len(sources)), [each["title"] for each in sources])
    axes.invert_yaxis()
    axes.set_xlabel("left out")
    if report["sources"]:
        axes.legend(fontsize=8)


def _write(path: Path, draw: Any, report: Mapping[str, Any]) -> Path:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    draw(axes, report)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    temporary.write_bytes(picture.getvalue())
    os.replace(temporary, path)
    return path
