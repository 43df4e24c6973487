"""A reply on the screen while it is written: markdown that does not flicker, or plain text where that is all there is.

Finished blocks go into the scrollback once and are never touched again. Only the last, unfinished block is redrawn,
from the first line that changed, in one write, and no line is blanked before its new text is there.
"""

from __future__ import annotations

import re
import threading
import time
from itertools import chain
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from koala_local.chat.markdown import Block, Line, blocks, render
from koala_local.engine.text_stream import EscapeFilter

REFRESH_S = 1 / 15
_PATIENCE_S = 1.0  # a shorter wait for the first token needs no progress line
REST = 9  # after a costly redraw, this many times its cost: drawing takes a tenth of one core at most
# A last line, not yet ended, that may still become one kind of block or another: "-" a list or an underlined heading,
# "1" a list or a sum, "``" code. It is shown as soon as that is decided.
_UNDECIDED = re.compile(r"[\s>#=_|:`~*+-]*|[\s>*+-]*\d{1,9}[.)]?\s*|\s*(?:```|~~~).*")


class ReplyView:
    """Shows one reply as it comes; a context manager. The cursor stands at the start of a line before and after.

    A terminal gets markdown. On a dumb terminal or one without UTF-8, and where the console is no terminal, the text is
    written at once and as it is. Everything passes the escape filter.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._utf8 = console.encoding.startswith("utf")
        self._markdown = console.is_terminal and not console.is_dumb_terminal and self._utf8
        self._filter = EscapeFilter()
        self._at_line_start = True
        self._new: list[str] = []
        self._tail = ""  # the source of the unfinished block, maybe after one blank line
        self._previous = ""  # the kind of the block before it
        self._printed = 0  # how many of its lines are in the scrollback already
        self._screen = _Screen(console)
        self._next_refresh = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def feed(self, text: str) -> None:
        """Add `text` to the reply. What is drawn follows within 1/15 s of the next feed, or at `close`."""
        text = self._filter.feed(text)
        if not self._markdown:
            self._write(text)
            return
        self._new.append(text)
        began = self._console.get_time()
        if began >= self._next_refresh:
            self._refresh()
            ended = self._console.get_time()
            self._next_refresh = ended + max(REFRESH_S, REST * (ended - began))

    def close(self) -> None:
        """Show the rest and end the line."""
        self._filter.finish()
        if self._markdown:
            self._refresh(final=True)
        elif not self._at_line_start:
            self._write("\n")

    def _write(self, text: str) -> None:
        if not text:
            return
        if not self._utf8:
            text = text.encode(self._console.encoding, "replace").decode(self._console.encoding)
        self._at_line_start = text.endswith("\n")
        self._console.print(Segments([Segment(text)]), end="", crop=False)  # `out` would expand tabs

    def _refresh(self, *, final: bool = False) -> None:
        """Print what is finished, and draw the last block anew."""
        self._tail += "".join(self._new)
        self._new.clear()
        source = self._tail
        head, newline, last_line = source.rpartition("\n")
        if not final and _UNDECIDED.fullmatch(last_line):
            source = head + newline
        done: list[Line] = []
        live: list[Line] = []
        found = blocks(source)
        for block in found:
            lines = render(block, self._console, self._console.width, self._printed)
            gap = self._gap_before(block) and not self._printed
            lines = [[]] * gap + lines
            if final or block is not found[-1]:
                done += lines
                self._previous, self._printed = block.kind, 0
            else:
                settled = block.settled and block.settled - self._printed + gap
                done += lines[:settled]
                live, self._printed = lines[settled:], block.settled
        if found:
            start = found[-1].start - found[-1].after_blank
            self._tail = "" if final else "\n".join(self._tail.split("\n")[start:])
        self._screen.draw(done, live)

    def _gap_before(self, block: Block) -> bool:
        """Whether a blank line comes before a block: not at the top, and within a list only as in the source."""
        same_list = block.kind == self._previous and block.kind.endswith("list_open")
        return bool(self._previous) and (block.after_blank or not same_list)


class _Screen:
    """Lines for the scrollback, and below them the lines that may still change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: list[Line] = []  # as they stand on the screen; the cursor is at the end of the last
        self._width = 0

    def draw(self, done: list[Line], live: list[Line]) -> None:
        """Put `done` where the live lines began, and `live` below, as much of its end as the screen holds."""
        width, height = self._console.size
        live = [row for line in live for row in _rows(line, width)][-max(1, height - 1) :]
        out: list[str | Line] = []
        if self._live and width != self._width:  # the terminal has wrapped the lines anew
            up = sum(len(_rows(line, width)) for line in self._live) - 1
            out.append(_up(up) + "\r\x1b[J")
            self._live = []
        old, new = self._live, done + live
        if old == live and not done:
            return
        changed = (i for i, pair in enumerate(zip(old, new, strict=False)) if done or pair[0] != pair[1])
        same = max(0, min(next(changed, len(old)), len(new) - 1))
        if same == len(old):
            out.append("\n" * bool(old))
        else:
            out.append(_up(len(old) - 1 - same) + "\r" + "\x1b[J" * (len(new) < len(old)))
        for i, line in enumerate(new[same:], same):
            # Without automatic wrapping a live line is one row even where the terminal takes an emoji for wider.
            out.append("\x1b[?7l" * (i == max(same, len(done))))
            out.append(line)
            cells = Segment.get_line_length(line)
            out.append("\x1b[K" * (i < len(old) and (cells % width > 0 or not cells)))
            out.append("\n" * (i < len(new) - 1 or not live))
        out.append("\x1b[?7h" * bool(live))
        self._live, self._width = live, width
        parts = [part if isinstance(part, list) else [Segment(part)] for part in out if part]
        self._console.print(Segments(chain.from_iterable(parts)), end="", crop=False)


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows else ""


def _rows(line: Line, width: int) -> list[Line]:
    """The rows of the screen that a line takes."""
    cells = Segment.get_line_length(line)
    return list(Segment.divide(line, range(width, cells + width, width))) if cells > width else [line]


class PrefillLine:
    """One line that says how far the prompt has been read, shown when that takes long, gone afterwards."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._live: Live | None = None
        self._stopped = False
        self._started = 0.0
        self._done = self._total = 0

    def update(self, done: int, total: int) -> None:
        """`done` of `total` tokens are evaluated. From any thread."""
        with self._lock:
            self._done, self._total = done, total
            if self._timer is None and not self._stopped:
                self._started = time.monotonic()
                self._timer = threading.Timer(_PATIENCE_S, self._show)
                self._timer.daemon = True
                self._timer.start()

    def stop(self) -> None:
        """Take the line away for good."""
        with self._lock:
            self._stopped = True
            if self._timer:
                self._timer.cancel()
            if self._live:
                self._live.stop()
                self._live = None

    def _show(self) -> None:
        with self._lock:
            if not self._stopped:
                self._live = Live(
                    get_renderable=self._line,
                    console=self._console,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._live.start()

    def _line(self) -> Text:
        text = f"reading {self._total} tokens"
        if self._done:
            rate = self._done / max(time.monotonic() - self._started, 1e-3)
            text = f"read {self._done} of {self._total}, {rate:.0f}/s, {(self._total - self._done) / rate:.0f} s left"
        return Text(text, "dim", no_wrap=True, overflow="ellipsis")
