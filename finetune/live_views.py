"""What a person sees of a running training: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

from koala_local import console

if TYPE_CHECKING:
    from .train import Step

_SMOOTH = 0.9  # how much of the average speed the next step leaves


class TrainingView:
    """Shows steps as they come. `price`: dollars an hour of all GPUs, None where it is not known."""

    def __init__(self, total_steps: int, done: int, price: float | None) -> None:
        self._total, self._first, self._price = total_steps, done, price
        self._begun = self._last_line = time.monotonic()
        self._seconds: float | None = None  # of a step, smoothed
        self._before = self._begun
        terminal = console.err_console()
        drawn = terminal.is_terminal and not terminal.is_dumb_terminal
        self._live = Live(console=terminal, transient=True, auto_refresh=False) if drawn else None

    def __enter__(self) -> TrainingView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def step(self, step: Step) -> None:
        """Show one step."""
        now = time.monotonic()
        took, self._before = now - self._before, now
        self._seconds = took if self._seconds is None else _SMOOTH * self._seconds + (1 - _SMOOTH) * took
        line = self.line(step, now - self._begun)
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif now - self._last_line >= console.TELL_S or step.step in (self._first + 1, self._total):
            self._last_line = now
            console.note(line)

    def busy(self, what: str) -> None:
        """Say what goes on between two steps, where there is a terminal."""
        if self._live:
            self._live.update(Text(f"{what} ..", no_wrap=True, overflow="ellipsis"), refresh=True)

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self._live:
            self._live.console.print(text, highlight=False)
        else:
            console.note(text)

    def line(self, step: Step, elapsed: float) -> str:
        """The step in one line; `elapsed` is seconds since the start."""
        left = (self._total - step.step) * (self._seconds or 0.0)
        parts = [
            f"step {step.step}/{self._total}",
            f"loss {step.loss:.4f}",
            f"{step.tokens_per_s:,.0f} tokens/s",
            *([f"MFU {step.mfu:.1%}"] if step.mfu is not None else []),
            f"{step.memory_gb:.1f} GB",
            f"{_clock(left)} left",
            *([f"${self._price * elapsed / 3600:.2f} so far"] if self._price is not None else []),
        ]
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
