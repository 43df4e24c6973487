"""How the next token is drawn: the numbers a user may set, checked once, here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from koala_local.errors import KoalaError


class Sampling(NamedTuple):
    """Settings of the sampler chain: penalties, top-k, top-p, min-p, temperature. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    max_tokens: int = 0  # 0: as many as the context holds


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 10.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.5, 3.0),
    "repeat_last_n": (0, 65_536),
    "max_tokens": (0, 1_000_000),
}


def with_setting(sampling: Sampling, name: str, value: str | float) -> Sampling:
    """`sampling` with one setting changed, from a number or its text. Raises KoalaError where that is no setting."""
    key = name.replace("-", "_")
    if key not in _RANGES:
        raise KoalaError(f"there is no sampling setting called {name!r}", f"settings: {', '.join(_RANGES)}")
    whole = isinstance(Sampling._field_defaults[key], int)
    low, high = _RANGES[key]
    try:
        number = int(value) if whole else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:  # NaN fails every comparison
        kind = "a whole number" if whole else "a number"
        raise KoalaError(f"{name} cannot be {value}", f"{name} is {kind} from {low:,.15g} to {high:,.15g}")
    changes: dict[str, Any] = {key: number}
    return sampling._replace(**changes)
