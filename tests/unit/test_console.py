from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala_local import console
from koala_local.errors import Interrupted, KoalaError, ModelFileError

PRELUDE = "import sys, time\nfrom koala_local import console\nfrom koala_local.errors import *\n"


def script(body: str, *, tracebacks: bool = False) -> list[str]:
    """A program whose command is `body`."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    run = f"sys.exit(console.run(command, tracebacks={tracebacks}))"
    return [sys.executable, "-c", f"{PRELUDE}def command():\n{lines}{run}"]


def run(
    body: str, *, tracebacks: bool = False, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(body, tracebacks=tracebacks),
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **(environment or {})},
        timeout=30,
        check=False,
    )


def fail_with(error: BaseException) -> tuple[int, str]:
    """The exit status and stderr of a command that raises `error`, run in this process."""

    def command() -> int:
        raise error

    with redirect_stderr(io.StringIO()) as stderr, redirect_stdout(io.StringIO()) as stdout:
        status = console.run(command)
    assert stdout.getvalue() == ""
    return status, stderr.getvalue()


def test_results_go_to_stdout_and_all_else_to_stderr() -> None:
    done = run("console.out('result')\nconsole.note('a note')\nconsole.warn('amiss')\nreturn 0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "a note\nkoala: warning: amiss\n")


@pytest.mark.parametrize(("returned", "status"), [("None", 0), ("0", 0), ("7", 7)])
def test_a_command_returns_its_exit_status(returned: str, status: int) -> None:
    assert run(f"return {returned}").returncode == status


@pytest.mark.parametrize(
    ("error", "status", "stderr"),
    [
        (KoalaError("it broke", "mend it"), 1, "koala: error: it broke\nhint: mend it\n"),
        (ModelFileError("no hint here"), 1, "koala: error: no hint here\n"),
        (console.UsageError("no such thing", "see --help"), 2, "koala: error: no such thing\nhint: see --help\n"),
        (Interrupted(), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(5), 5, ""),
        (SystemExit(None), 0, ""),
        (BrokenPipeError(), 141, ""),
        (
            PermissionError(13, "Permission denied", "/a/file"),
            1,
            "koala: error: Permission denied: /a/file\nhint: check that place; --traceback shows where it happened\n",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "koala: internal error: ZeroDivisionError: division by zero\n"
            "hint: run it again with --traceback and report what it prints\n",
        ),
    ],
)
def test_every_error_has_its_words_and_exit_status(error: BaseException, status: int, stderr: str) -> None:
    assert fail_with(error) == (status, stderr)


def test_escapes_and_newlines_in_an_error_do_not_reach_the_terminal() -> None:
    status, stderr = fail_with(KoalaError("bad \x1b]52;c;ZXZpbA==\x07name\nsecond\r\nline\x9b31m", "do\n\nthis\x1b[2J"))
    assert (status, stderr) == (1, "koala: error: bad name second line\nhint: do this\n")


@given(st.text(), st.text())
def test_any_message_is_one_line_and_any_hint_another(message: str, hint: str) -> None:
    _, stderr = fail_with(KoalaError(message, hint))
    lines = stderr.splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith("koala: error:")
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for line in lines for char in line if char != "\t")


def test_a_traceback_is_shown_only_when_asked_for() -> None:
    failing = "raise KoalaError('it broke', 'mend it')"
    assert "Traceback" not in run(failing).stderr
    shown = run(failing, tracebacks=True)
    assert shown.stderr.startswith("Traceback (most recent call last):\n")
    assert shown.stderr.endswith("\nkoala: error: it broke\nhint: mend it\n")
    assert shown.returncode == 1
    assert "ZeroDivisionError" in run("1 / 0", tracebacks=True).stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_runs_the_finally_blocks(number: int, status: int) -> None:
    body = "try:\n  console.out('ready')\n  time.sleep(30)\nfinally:\n  console.out('cleaned up')"
    with subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=10) == ("cleaned up\n", "")
    assert process.returncode == status


def test_a_second_sigterm_ends_the_program_at_once() -> None:
    body = "try:\n  console.out('ready')\n  time.sleep(30)\nfinally:\n  console.out('cleaning')\n  time.sleep(30)"
    with subprocess.Popen(script(body), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("ready\n", "cleaning\n"):
            assert process.stdout.readline() == line
            process.terminate()
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_nohup_is_respected() -> None:
    body = "console.out('ready')\ntime.sleep(0.3)\nconsole.out('still here')"
    argv = script(f"import signal\n{body}")
    with subprocess.Popen(["nohup", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=10)[0] == "still here\n"
    assert process.returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = script("for number in range(100000): console.out(f'line {number}')")
    pipe = ["bash", "-c", '"$@" | head -n 1; echo "status ${PIPESTATUS[0]}"', "bash", *program]
    shell = subprocess.run(pipe, capture_output=True, text=True, timeout=30, check=True)
    assert (shell.stdout, shell.stderr) == ("line 0\nstatus 141\n", "")


def test_a_full_disk_behind_stdout_is_one_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            script("console.out('text')"), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("koala: error: No space left on device\nhint: ")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_no_harm(closing: str) -> None:
    argv = script("console.out('result')\nconsole.note('note')\nconsole.json_line({})\nreturn 4")
    shell = ["bash", "-c", f'"$@" {closing}', "bash", *argv]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stdout == ("" if closing.startswith(">") else "result\n{}\n")


def test_any_character_can_be_printed_in_a_c_locale() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    body = r"console.out('\xe9 \U0001f428 \udcff'); console.note('\xfc \ud800'); raise KoalaError('\xf1')"
    done = run(body, environment=locale)
    assert done.stdout == "é 🐨 \N{REPLACEMENT CHARACTER}\n"
    assert done.stderr == "ü \N{REPLACEMENT CHARACTER}\nkoala: error: ñ\n"


def test_json_lines_carry_any_text_and_are_ascii() -> None:
    content = {"text": "é\x1b[31m\x9b\u2028\n🐨", "number": 1.5, "list": [None, True]}
    with redirect_stdout(io.StringIO()) as stdout:
        console.json_line(content)
    line = stdout.getvalue()
    assert line.isascii()
    assert line.count("\n") == 1
    assert json.loads(line) == content


@pytest.mark.parametrize("write", [console.out, console.note, console.warn])
def test_no_escape_sequence_is_printed(write: Callable[[str], None]) -> None:
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        write("one\x1b]0;title\x07 two\x1b[31m\tthree")
    assert (stdout.getvalue() + stderr.getvalue()).replace("\t", " ").endswith("one two three\n")


@pytest.mark.parametrize(
    ("environment", "seen", "unseen"),
    [
        ({"TERM": "xterm-256color"}, "\x1b[31mred", ""),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "red", "\x1b[31m"),
        ({"TERM": "dumb"}, "red", "\x1b"),
    ],
)
def test_rich_output_honours_the_terminal(environment: dict[str, str], seen: str, unseen: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    program, *arguments = script("console.out_console().print('red', style='red')")
    child = pexpect.spawn(program, arguments, env={**inherited, **environment}, encoding="utf-8", timeout=20)
    child.expect(pexpect.EOF)
    assert seen in child.before
    assert not unseen or unseen not in child.before


def test_what_rich_prints_as_plain_text() -> None:
    from rich.table import Table

    table = Table("name", "tokens")
    table.add_row("[bold]koala[/]", "12")
    text = console.as_text(table)
    assert "[bold]koala[/]" in text
    assert "12" in text
    assert "\x1b" not in text
    assert console.as_text("a\x1b[31mb") == "ab"


@pytest.fixture
def narrow() -> Iterator[tuple[int, IO[str]]]:
    """A terminal of 40 columns: the descriptor to read from, and the stream to write to."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
    os.close(reader)


def read_all(reader: int) -> str:
    shown = ""
    while select.select([reader], [], [], 0.5)[0]:  # it comes in parts
        shown += os.read(reader, 10_000).decode()
    return shown


def test_a_text_is_folded_at_words_on_a_narrow_terminal(narrow: tuple[int, IO[str]]) -> None:
    _, stream = narrow
    path = "/home/someone/" + "x" * 60
    lines = console.folded(f"the model at {path} takes more than this machine has", "1. ", "   ", stream=stream)
    assert lines.splitlines() == ["1. the model at", f"   {path}", "   takes more than this machine has"]
    assert console.folded("word " * 20, stream=io.StringIO()) == "word " * 20
    assert console.folded("two  columns", stream=stream) == "two  columns"


def test_notes_and_progress_are_readable_on_a_narrow_terminal(
    narrow: tuple[int, IO[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, stream = narrow
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")  # rich looks at the streams that the program was started with
    console.note("first line\n" + "word " * 12)
    assert os.read(reader, 1000).decode().splitlines() == ["first line", "word " * 7 + "word", "word " * 3 + "word"]
    with console.progress("downloading", "B") as step:
        step(1_300_000, 7_900_000, "koala-13B-HF.Q4_K_M.gguf")
    shown = read_all(reader)
    assert "1.3/7.9 MB" in shown and "Q4_K_M" not in shown


@pytest.mark.parametrize(("columns", "wide"), [(40, False), (80, True)])
def test_what_is_counted_has_a_rate_where_there_is_room(
    narrow: tuple[int, IO[str]], monkeypatch: pytest.MonkeyPatch, columns: int, wide: bool
) -> None:
    reader, stream = narrow
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with console.progress("quantizing", "matrix") as step:
        for done in (1, 2, 3):
            time.sleep(0.2)
            step(done, 280, "model.layers.0.self_attn.q_proj")
    shown = read_all(reader)
    assert "3/280" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    rate = r"3/280 \d\.\d matrix/s \d:\d\d:\d\d model\.layers\.0\.self_attn\.q_proj"
    assert bool(re.search(rate, plain)) == wide, plain


def test_progress_that_is_not_drawn_is_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "TELL_S", 0.0)
    with console.progress("downloading", "B") as step:
        step(0, 1000)
        step(250, 1000, "a.gguf")
        monkeypatch.setattr(console, "TELL_S", 60.0)
        step(500, 1000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "downloading: 0.0 MB of 1.0 kB"
    assert second.startswith("downloading a.gguf: 0.2 kB of 1.0 kB")


@pytest.mark.parametrize(
    ("terminal", "environment", "written"),
    [
        (True, {"TERM": "xterm"}, "\x1b[31m\x1b[1ma b\x1b[0m\n"),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, "\x1b[1ma b\x1b[0m\n"),
        (True, {"TERM": "dumb"}, "a b\n"),
        (False, {"TERM": "xterm"}, "a b\n"),
    ],
)
def test_a_style_is_what_the_terminal_has(
    terminal: bool, environment: dict[str, str], written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = io.StringIO()
    monkeypatch.setattr(page, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", page)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console.styled("a\x1b[31m b", fg="red", bold=True)
    assert page.getvalue() == written
    monkeypatch.setattr(sys, "stdout", None)
    console.styled("nobody reads it")
