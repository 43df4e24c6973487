"""What starting costs: `koala --help`, and from the command to the prompt in a terminal.

From the second the model's load is subtracted: llama.cpp's own time to load the same file and make a context of the
same size, without the program. What remains is Python, imports, the check of the file, the probe and the screen.

The program is measured as it runs everywhere but in some containers: with its modules compiled once and kept. The first
start, which may have to compile them, is not counted.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import termios
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.models import CONTEXT, Model
from benchmarks.peers import BareLoop
from benchmarks.table import Row

_PROMPT = b"\x1b[?2004h"  # bracketed paste: the line editor turns it on with the first drawing of the prompt
_TIMEOUT_S = 60


def run_help(quick: bool) -> list[Row]:
    """The row for `koala --help`."""
    name, command = "koala --help", _command()
    if command is None:
        return [Row(name, None, note="skipped: there is no koala command yet")]
    seconds = []
    for _ in range(4 if quick else 10):
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment(), check=False
        )
        seconds.append(time.perf_counter() - started)
        if done.returncode:
            return [Row(name, None, note=f"skipped: it ends with status {done.returncode}")]
    return [Row(name, median(seconds[1:]), "s", at_most=0.2)]


def run(model: Model, quick: bool) -> list[Row]:
    """The row for the prompt with one model."""
    name, command = f"start to prompt, {model.name}", _command()
    if command is None:
        return [Row(name, None, note="skipped: there is no koala command")]
    repeats = 3 if quick else 8
    loads, starts = [], []
    for _ in range(repeats):
        loads.append(_load_seconds(model))
        start = _prompt_seconds([*command, "chat", str(model.path)])
        if start is None:
            return [Row(name, None, note="skipped: no prompt came")]
        starts.append(start)
    start, load = median(starts[1:]), median(loads[1:])
    return [Row(name, start - load, "s", at_most=0.5, note=f"beyond the model's load: {start:.2f} s - {load:.2f} s")]


def _environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | more


def _command() -> list[str] | None:
    script = Path(sys.executable).with_name("koala")
    if script.exists():
        return [str(script)]
    if find_spec("koala_local.cli") is None:
        return None
    return [sys.executable, "-c", "import sys; from koala_local.cli import main; sys.exit(main())"]


def _load_seconds(model: Model) -> float:
    started = time.perf_counter()
    bare = BareLoop(model.path, CONTEXT)
    seconds = time.perf_counter() - started
    bare.close()
    return seconds


def _prompt_seconds(command: list[str]) -> float | None:
    """Seconds until the prompt is drawn in a terminal of 80 columns; None when it ends before. Without a fork of this
    process, which takes as long as it is large."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as home:
        leader, follower = os.openpty()
        termios.tcsetwinsize(follower, (24, 80))
        environment = _environment(KOALA_HOME=home, TERM="xterm-256color")
        started, seen, seconds = time.perf_counter(), b"", None
        with subprocess.Popen(
            command, env=environment, start_new_session=True, stdin=follower, stdout=follower, stderr=follower
        ) as process:
            os.close(follower)
            while seconds is None and (more := _read(leader)):
                seen += more
                seconds = time.perf_counter() - started if _PROMPT in seen else None
            os.write(leader, b"\x04")
            while _read(leader):  # until it is gone
                pass
            process.kill()
        os.close(leader)
    return seconds


def _read(terminal: int) -> bytes:
    """What comes next; nothing when the program is gone, or silent for long."""
    try:
        return os.read(terminal, 1 << 16) if select.select([terminal], [], [], _TIMEOUT_S)[0] else b""
    except OSError:  # Linux, where nobody has the terminal open any more
        return b""
