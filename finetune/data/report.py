"""What a build tells of itself: where its dialogues came from, how many and how long they are, what was left out.

The report is plain values, written as report.json; the same inputs give the same bytes, so no times are in it.
`koala data report` draws it besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from koala_local.disk import replacing

from .mix import REASONS, Tally
from .recipe import Recipe
from .sources import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
EDGES = tuple(2**n for n in range(3, 17))  # tokens; the last bin has everything longer
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")


def source_report(
    source: Source,
    tally: Tally,
    lengths: NDArray[np.int64],
    trained: int,
    files: Sequence[Mapping[str, str]],
    missing: Sequence[str] = (),
) -> dict[str, Any]:
    """Of one source: `lengths` are its examples' tokens, `trained` how many of them are trained on, `missing` those of
    its published files that were not there."""
    return {
        "title": source.title,
        "licence": source.licence,
        "published": source.published * 2 if tally.unhelpful else source.published,  # of pairs, both are counted here
        "files": [dict(file) for file in files],
        "missing": list(missing),
        **asdict(tally),
        "tokens": int(lengths.sum()),
        "trained_tokens": trained,
        "lengths": length_report(lengths),
    }


def length_report(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Quantiles, the longest, and the histogram over `EDGES`."""
    if not len(lengths):
        return {"quantiles": {}, "longest": 0, "histogram": [0] * len(EDGES)}
    bins = np.clip(np.searchsorted(EDGES, lengths, side="right") - 1, 0, len(EDGES) - 1)
    return {
        "quantiles": {str(q): int(np.quantile(lengths, q, method="lower")) for q in QUANTILES},
        "longest": int(lengths.max()),
        "histogram": np.bincount(bins, minlength=len(EDGES)).tolist(),
    }


def whole_report(
    recipe: Recipe,
    sources: Mapping[str, Mapping[str, Any]],
    test_sets: Sequence[Mapping[str, Any]],
    lengths: NDArray[np.int64],
    tokenizer: str,
) -> dict[str, Any]:
    """Of the whole mix."""
    counted = ("rows", "examples", "kept", "held_out", "turns", "tokens", "trained_tokens", "published")
    total: dict[str, Any] = {key: sum(each[key] for each in sources.values()) for key in counted}
    total["skipped"] = sum(sum(each["skipped"].values()) for each in sources.values())
    total["removed"] = {reason: sum(each["removed"][reason] for each in sources.values()) for reason in REASONS}
    return {
        "recipe": recipe.as_tree(),
        "tokenizer": tokenizer,
        "decontaminated": bool(test_sets),
        "test_sets": [dict(each) for each in test_sets],
        "length_edges": list(EDGES),
        "total": total | {"lengths": length_report(lengths)},
        "sources": {key: dict(each) for key, each in sources.items()},
    }


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
    from matplotlib.figure import Figure  # takes a moment, and a build draws nothing

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    draw(axes, report)
    with replacing(path) as picture:
        figure.savefig(picture, format="png", dpi=120)
    return path
