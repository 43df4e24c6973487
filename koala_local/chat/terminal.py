"""The terminal outside of the prompt: Ctrl-C, and what is typed meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def on_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Within, Ctrl-C calls `act`, in the main thread, and does nothing else."""
    before = signal.signal(signal.SIGINT, lambda _, __: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def raise_interrupt() -> NoReturn:
    """What Python does on Ctrl-C."""
    raise KeyboardInterrupt


def flush_keys() -> None:
    """Forget what was typed and not read yet."""
    if sys.stdin and sys.stdin.isatty():
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


@contextmanager
def silent_keys() -> Iterator[None]:
    """Within, what is typed is not shown; the next prompt gets it, Enter as Enter. Prompts and editors set the terminal
    for themselves. A dumb terminal, which edits its lines itself, stays as it is."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")  # as prompt_toolkit has it
    if not sys.stdin or not sys.stdin.isatty() or dumb:
        yield
        return
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    silent = termios.tcgetattr(keys)
    silent[0] &= ~termios.ICRNL  # so that Enter stays Enter
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    silent[3] |= termios.NOFLSH  # Ctrl-C stops a reply, and what was typed meanwhile stays
    termios.tcsetattr(keys, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSANOW, before)
