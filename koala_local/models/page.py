"""Tables of plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO

from koala_local.console import columns_of, folded
from koala_local.engine.text_stream import one_line


def columns(rows: Sequence[Sequence[str]], *, stream: IO[str] | None = None) -> str:
    """The rows with their columns aligned; where the terminal on `stream`, or stdout, is too narrow for that, each cell
    behind its heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join(row).rstrip() for row in padded]
    stream = stream or sys.stdout
    if not 0 < columns_of(stream) < max(map(len, lines)):
        return "\n".join(lines)
    heads = [head.strip().lower() for head in rows[0]]
    named = ([f"{head} {cell}".strip() for head, cell in zip(heads, row, strict=True) if cell] for row in rows[1:])
    return "\n".join(folded(", ".join(row), rest="  ", stream=stream) for row in named)


def section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and names with their values below it, folded at words where the terminal is too narrow."""
    width = max(len(name) for name, _ in rows)
    lines = [folded(one_line(value), f"  {name.ljust(width)}  ", " " * (width + 4)) for name, value in rows]
    return "\n".join([title, *lines])
