"""What a build tells of itself: where its dialogues came from, how many and how long they are, what was left out.

The report is plain values, written as report.json; the same inputs give the same bytes, so no times are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .mix import Tally
from .recipe import Recipe
from .sources import Source

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
EDGES = tuple(2**n for n in range(3, 17))  # tokens; the last bin has everything longer


def source_report(
    source: Source,
    tally: Tally,
    lengths: NDArray[np.int64],
    trained: int,
    files: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Of one source: `lengths` are its examples' tokens, `trained` how many of them are trained on."""
    return {
        "title": source.title,
        "licence": source.licence,
        "published": source.published * 2 if tally.unhelpful else source.published,  # of pairs, both are counted here
        "files": [dict(file) for file in files],
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
    total["removed"] = {reason: sum(each["removed"][reason] for each in sources.values()) for reason in Tally().removed}
    return {
        "recipe": recipe.as_tree(),
        "tokenizer": tokenizer,
        "decontaminated": bool(test_sets),
        "test_sets": [dict(each) for each in test_sets],
        "length_edges": list(EDGES),
        "total": total | {"lengths": length_report(lengths)},
        "sources": {key: dict(each) for key, each in sources.items()},
    }
