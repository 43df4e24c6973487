"""Tables of plain text, and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koala_local.console import folded
from koala_local.engine.text_stream import one_line


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """The rows with their columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"{indent}{'  '.join(row)}".rstrip() for row in padded)


def section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and names with their values below it, folded at words where the terminal is too narrow."""
    width = max(len(name) for name, _ in rows)
    lines = [folded(one_line(value), f"  {name.ljust(width)}  ", " " * (width + 4)) for name, value in rows]
    return "\n".join([title, *lines])


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def short_number(count: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def homeless(text: str) -> str:
    """`text` without the user's name: the home folder in it is written as ~."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
