from __future__ import annotations

import subprocess
import sys

import pytest

from koala_local import __version__
from koala_local.cli import COMMANDS

MAIN = "import sys\nfrom koala_local import cli\n{prepare}\nsys.exit(cli.main())"

FAKE = """
import types, click
from koala_local.errors import KoalaError
fake = types.ModuleType("fake")

@click.command()
@click.argument("act")
@click.pass_context
def chat(context, act):
    'Do one thing.'
    if act == "fail": raise KoalaError("it broke", "mend it")
    if act == "abort": raise click.Abort
    if act == "missing": raise click.FileError("model.gguf", "not there")
    if act == "exit": context.exit(3)
    return 4 if act == "four" else "a result that is no status"

@click.group()
def sessions(): 'Many things.'

@sessions.command()
def rm(): raise KoalaError("it broke")

fake.chat, fake.sessions = chat, sessions
sys.modules["fake"] = fake
cli.COMMANDS = {name: (f"fake:{name}", "") for name in ("chat", "sessions")}
"""


def koala(*arguments: str, prepare: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", MAIN.format(prepare=prepare), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def test_version() -> None:
    done = koala("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"koala {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str]) -> None:
    done = koala(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for name, (_, text) in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["chatt"], "No such command 'chatt'. Did you mean 'chat'?", "koala --help"),
        (["--nope"], "No such option '--nope'.", "koala --help"),
        (["chat", "--nope"], "No such option '--nope'.", "koala chat --help"),
        (["chat"], "Missing argument 'ACT'.", "koala chat --help"),
        (["sessions", "rm", "x"], "Got unexpected extra argument (x)", "koala sessions rm --help"),
    ],
)
def test_usage_errors_have_the_house_style(arguments: list[str], message: str, hint: str) -> None:
    done = koala(*arguments, prepare=FAKE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"koala: error: {message}", f"hint: {hint} lists what there is"]


@pytest.mark.parametrize(
    ("act", "status", "stderr"),
    [
        ("four", 4, ""),
        ("exit", 3, ""),
        ("other", 0, ""),
        ("abort", 130, ""),
        ("fail", 1, "koala: error: it broke\nhint: mend it\n"),
        ("missing", 1, "koala: error: Could not open file 'model.gguf': not there\n"),
    ],
)
def test_a_command_decides_the_exit_status(act: str, status: int, stderr: str) -> None:
    done = koala("chat", act, prepare=FAKE)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", stderr)


@pytest.mark.parametrize(
    "arguments",
    [["--traceback", "chat", "fail"], ["chat", "fail", "--traceback"], ["sessions", "rm", "--traceback"]],
)
def test_traceback_may_stand_anywhere(arguments: list[str]) -> None:
    done = koala(*arguments, prepare=FAKE)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert "koala: error: it broke\n" in done.stderr


def test_a_command_is_imported_only_when_called() -> None:
    broken = "cli.COMMANDS['chat'] = ('there_is_no_such_module:chat', '')"
    assert koala("--help", prepare=broken).returncode == 0
    called = koala("chat", prepare=broken)
    assert (called.returncode, called.stdout) == (1, "")
    assert called.stderr.startswith("koala: internal error: ModuleNotFoundError: ")
