"""The installed `koala` in a pseudo-terminal, with a screen that one can read."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

KOALA = shutil.which("koala", path=str(Path(sys.executable).parent)) or "koala"
ENTER, ALT_ENTER, CTRL_C, CTRL_D, CTRL_J = "\r", "\x1b\r", "\x03", "\x04", "\n"
_BAR = re.compile(r"\d+/\d+ [█░]")
_ROWS = 200  # nothing scrolls away


class _Screen(pyte.Screen):
    """Answers what programs ask a terminal, such as where the cursor is."""

    def __init__(self, columns: int, answer: Callable[[str], object]) -> None:
        self._answer = answer
        super().__init__(columns, _ROWS)

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class Terminal:
    """A running `koala`, started beside its home folder, and its screen."""

    def __init__(self, home: Path, *arguments: str | Path, columns: int = 80, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self._child = pexpect.spawn(
            KOALA,
            [str(argument) for argument in arguments],
            env=kept | {"KOALA_HOME": str(home), "TERM": "xterm-256color", "LANG": "C.UTF-8"} | environment,
            cwd=home.parent,
            dimensions=(_ROWS, columns),
        )
        self._child.delaybeforesend = None
        self._screen = _Screen(columns, self._child.send)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without the empty rest."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip().split("\n")

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def bar(self) -> str:
        """The bar below the prompt, or nothing while there is none."""
        return self.lines[-1] if _BAR.search(self.lines[-1]) else ""

    @property
    def typed(self) -> str:
        """The line that the cursor is on."""
        return self._screen.display[self._screen.cursor.y].rstrip()

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        """Read until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}; the screen shows:\n{self._shown()}"
            try:
                data = self._child.read_nonblocking(1 << 16, timeout=0.1)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition(), f"the program ended instead of {what}; the screen shows:\n{self._shown()}"
                return
            self.raw += data
            self._stream.feed(data)

    def _shown(self) -> str:
        return "\n".join(line for line in self.lines if line)

    def wait_for(self, text: str) -> None:
        self.wait(lambda: text in self.text, repr(text))

    def ready(self) -> None:
        """Wait for an empty prompt with its bar."""
        self.wait(lambda: bool(self.bar) and self.typed == ">", "a prompt")

    def quiet(self) -> None:
        """Wait until the terminal itself no longer shows what is typed."""
        self.wait(lambda: not self._child.getecho(), "a terminal without echo")

    def keys(self, keys: str) -> None:
        self._child.send(keys)

    def resize(self, columns: int) -> None:
        self._screen.resize(_ROWS, columns)
        self._child.setwinsize(_ROWS, columns)

    def send(self, text: str) -> str:
        """Send a message or a command, wait for the next prompt, and return what was written in between."""
        self.keys(text)
        self.wait(lambda: self.typed.endswith(text[-10:]), f"{text!r} in the prompt")
        start = self._screen.cursor.y + 1
        self.keys(ENTER)
        self.wait(lambda: self._screen.cursor.y > start and bool(self.bar) and self.typed == ">", "the next prompt")
        return "\n".join(self.lines[start : self._screen.cursor.y]).strip()

    def end(self) -> int:
        """Wait for the program to end and return its exit status."""
        self.wait(lambda: not self._child.isalive(), "the end")
        self._child.close()
        return int(self._child.exitstatus if self._child.exitstatus is not None else -self._child.signalstatus)

    def kill(self) -> None:
        self._child.close(force=True)
