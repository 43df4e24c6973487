"""Amounts, lists and errors in words, for people."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float, digits: int = 2) -> str:
    """Bytes: GB with so many digits behind the point where that shows two that count, else MB, or kB."""
    if count >= 10.0 ** (10 - digits):
        return f"{count / 1e9:.{digits}f} GB"
    if count >= 10.0 ** (7 - digits) or not count:
        return f"{count / 1e6:.{digits - 1}f} MB"
    return f"{count / 1e3:.{digits - 1}f} kB"


def short_number(count: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds."""
    if seconds >= 60:
        return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def first_of(names: Sequence[str], most: int) -> str:
    """The first ones with commas between, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def as_markdown(text: str, length: int = 2000) -> str:
    """The beginning of a text from elsewhere on one line, without control characters or anything that Markdown or HTML
    would act upon."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return "".join(f"\\{c}" if c in "\\`*[]<>|#!" else c for c in line[:length])


def first_line(error: BaseException, length: int = 200) -> str:
    """The beginning of what a library's error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]
