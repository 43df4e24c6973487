"""How far the prompt has been read, while there is no reply to show yet."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PATIENCE_S = 1.0  # a shorter wait needs no progress line


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
