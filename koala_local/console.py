"""The only module that prints: results go to stdout, all else to stderr, and every failure ends here in two lines.

`run` is the one funnel for errors. What it prints is free of terminal escapes, whatever file or model it came from.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Any, NoReturn

from koala_local.errors import Interrupted, KoalaError
from koala_local.wording import duration, size

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console


_NARROWEST = 16  # columns of a text that is folded
_WIDE = 72  # columns for all of a progress line
_LONGEST_LINE = 2000  # characters of an error
TELL_S = 15.0  # from one line about progress to the next


class Exit(IntEnum):
    """What the program's exit status tells. A signal's is 128 and its number, as a shell has it."""

    OK = 0
    ERROR = 1
    USAGE = 2
    HANGUP = 129
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class UsageError(Exception):
    """A command line that makes no sense: `message` says why, `hint` what to run instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def out(text: str) -> None:
    """Write a result to stdout."""
    _write(sys.stdout, text)


def styled(text: str, **style: Any) -> None:
    """Write a line to stdout, folded at words, in `click.style`'s `style` where the terminal has one."""
    import click

    if sys.stdout is None:  # it was closed before the program started
        return
    if os.environ.get("NO_COLOR"):
        style.pop("fg", None)
    plain = not sys.stdout.isatty() or os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    text = folded(_plain(text))
    print(text if plain or not style else click.style(text, **style), flush=True)


def json_line(content: object) -> None:
    """Write one line of JSON to stdout. In ASCII: nothing in it can act on a terminal, and nothing is lost."""
    _write(sys.stdout, json.dumps(content, ensure_ascii=True))


def note(text: str) -> None:
    """Tell the user something that is no result, folded at words where the terminal is too narrow for a line."""
    _write(sys.stderr, "\n".join(folded(line, stream=sys.stderr) for line in text.split("\n")))


def folded(text: str, first: str = "", rest: str = "", *, stream: IO[str] | None = None) -> str:
    """`text` behind `first`, in lines as wide as the terminal on `stream`, or stdout; the later ones behind `rest`. A
    word that is longer, such as a path, stays whole: it is to be copied."""
    import textwrap

    width = columns_of(stream or sys.stdout)
    if width < len(rest) + _NARROWEST or len(first) + len(text) <= width:
        return f"{first}{text}"
    fold = textwrap.TextWrapper(width, first, rest, break_long_words=False, break_on_hyphens=False)
    return fold.fill(text)


def columns_of(stream: IO[str]) -> int:
    """How wide the terminal on `stream` is; 0 where there is none."""
    with suppress(OSError, ValueError, AttributeError):  # no terminal, closed, None
        return os.get_terminal_size(stream.fileno()).columns
    return 0


def warn(text: str) -> None:
    """Tell the user what may be amiss, in one line."""
    note(f"koala: warning: {_one_line(text)}")


def out_console() -> Console:
    """A rich console on stdout. Rich itself honours NO_COLOR, TERM=dumb and a stdout that is no terminal."""
    return _console(stderr=False)


def err_console() -> Console:
    """A rich console on stderr."""
    return _console(stderr=True)


def as_text(content: object) -> str:
    """What a text, or anything rich can print, looks like without colours."""
    if isinstance(content, str):
        return _plain(content)
    page = io.StringIO()
    _console(file=page, width=100, force_terminal=False, color_system=None).print(content)
    return _plain(page.getvalue().rstrip("\n"))


@contextmanager
def progress(what: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """A bar on stderr, where that is a terminal, with count or bytes (`unit` "B"), rate and time left; count and
    time on a narrow one; else a line now and then. Yields `step(done, total, detail="")`."""
    from rich import progress as bars
    from rich.table import Column
    from rich.text import Text

    class _Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            return Text(_rate(task.finished_speed or task.speed, unit))

    console, seconds = err_console(), 3600.0  # over which a rate is taken: a layer may need minutes
    drawn, told = console.is_terminal and not console.is_dumb_terminal, time.monotonic()
    counts: list[Any] = [bars.MofNCompleteColumn(), _Rate(Column(no_wrap=True))]
    if unit == "B":
        counts, seconds = [bars.DownloadColumn(), bars.TransferSpeedColumn()], 30.0
    columns: list[Any] = [bars.TextColumn("{task.description}"), bars.BarColumn(), *counts, bars.TimeRemainingColumn()]
    columns.append(bars.TextColumn("{task.fields[detail]}"))
    if console.width < _WIDE:
        columns = [columns[0], counts[0], columns[-2]]
    options: dict[str, Any] = {"console": console, "transient": True, "disable": not drawn}
    with bars.Progress(*columns, speed_estimate_period=seconds, **options) as bar:
        task = bar.add_task(what, total=None, detail="")

        def step(done: int, total: int | None, detail: str = "") -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, detail=_plain(detail))
            if not drawn and time.monotonic() - told >= TELL_S:
                told, left = time.monotonic(), bar.tasks[0].time_remaining
                amount = " of ".join(size(n) if unit == "B" else f"{n:,}" for n in (done, total) if n is not None)
                rest = f", {duration(left)} left" if left else ""
                note(f"{what} {detail}".rstrip() + f": {amount}{rest}")

        yield step


def _rate(speed: float | None, unit: str) -> str:
    """The unit alone as long as no rate is known."""
    if not speed:
        return unit
    unit = unit or "step"
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


def run(command: Callable[[], int | None], *, tracebacks: bool = False) -> int:
    """Run `command` and return the exit status: its own, or that of the error it ended with, which is printed."""
    _make_streams_utf8()
    quiet_libraries()
    with _stop_signals():
        try:
            status = command() or Exit.OK
            if sys.stdout is not None:
                sys.stdout.flush()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            status = _report(error, tracebacks)
    _abandon_if_broken(sys.stdout)
    _abandon_if_broken(sys.stderr)
    return status


def quiet_libraries() -> None:
    """Hide what libraries tell about things that a user cannot change; the first of it comes when they are imported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _report(error: BaseException, tracebacks: bool) -> Exit:
    """Print what `error` means to the user and return its exit status."""
    if isinstance(error, BrokenPipeError):
        return Exit.BROKEN_PIPE  # the reader has seen enough, as with `koala .. | head`
    with suppress(OSError):  # nobody may be reading stderr
        if tracebacks:
            note("".join(traceback.format_exception(error)).rstrip())
        _explain(error)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return Exit.INTERRUPTED
    return Exit.USAGE if isinstance(error, UsageError) else Exit.ERROR


def _explain(error: BaseException) -> None:
    match error:
        case Interrupted() | KeyboardInterrupt():
            if sys.stderr and sys.stderr.isatty():
                note("")  # ends the line on which the terminal shows ^C
        case KoalaError() | UsageError():
            _report_error("error", error.message, error.hint)
        case OSError():
            where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
            hint = f"check {'that place' if where else 'the disk'}; --traceback shows where it happened"
            _report_error("error", f"{error.strerror or error}{where}", hint)
        case _:
            what = f"{type(error).__name__}: {error}"
            _report_error("internal error", what, "run it again with --traceback and report what it prints")


def _report_error(kind: str, message: str, hint: str) -> None:
    note(f"koala: {kind}: {_one_line(message)}")
    if hint:
        note(f"hint: {_one_line(hint)}")


def _write(stream: IO[str] | None, text: str) -> None:
    if stream is not None:  # None: it was closed before the program started
        print(_plain(text), file=stream, flush=True)


def _plain(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    from koala_local.engine.text_stream import plain

    return plain(text)


def _one_line(text: str) -> str:
    from koala_local.engine.text_stream import one_line

    return one_line(text, _LONGEST_LINE)


def _console(**options: Any) -> Console:
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `run` gives it its exit status

    return _Console(markup=False, emoji=False, highlight=False, **options)


def _make_streams_utf8() -> None:
    """Whatever the locale: no character makes printing fail."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


@contextmanager
def told_when_stopped(text: str) -> Iterator[None]:
    """Say `text` when the user, or a signal, stops what the block does."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted, SystemExit):  # the last one is a signal's
        with suppress(OSError):  # nobody may be reading stderr
            note(text)
        raise


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Turn the first SIGTERM, and a SIGHUP from a closed terminal, into SystemExit, so that `finally` blocks run. The
    second one ends the program at once. Signals that someone ignores or handles already are left alone."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _abandon_if_broken(stream: IO[str] | None) -> None:
    """Where the rest of the output cannot be written, let it go to nowhere, or Python would complain once more."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
