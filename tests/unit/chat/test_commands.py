"""How a line becomes a command."""

from __future__ import annotations

import pytest

from koala_local.chat.commands import COMMANDS
from koala_local.chat.front import Front
from koala_local.errors import KoalaError
from tests.unit.chat.recorder import Recorder, users


def test_the_recorder_is_a_front(front: Recorder) -> None:
    checked: Front = front
    assert checked.last is None


def test_help_names_every_command(front: Recorder) -> None:
    text = front.run("/help")
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "/undo" not in front.run("/help regen")
    assert "/regen" in front.run("/")


@pytest.mark.parametrize(("typed", "meant"), [("/udno", "/undo"), ("/session", "/sessions"), ("/SWICH 2", "/switch")])
def test_an_unknown_command_names_the_likely_one(front: Recorder, typed: str, meant: str) -> None:
    with pytest.raises(KoalaError, match="no command") as caught:
        front.run(typed)
    assert meant in caught.value.hint
    assert "//" in caught.value.hint


def test_two_slashes_begin_a_message_with_one(front: Recorder) -> None:
    front.run("//etc/hosts is a file")
    assert users(front) == ["/etc/hosts is a file"]


@pytest.mark.parametrize("line", ["/regen", "/undo", "/edit 1 x", "/branch", "/copy", "/rename x"])
def test_nothing_to_work_on_yet(front: Recorder, line: str) -> None:
    with pytest.raises(KoalaError) as caught:
        front.run(line)
    assert caught.value.hint


@pytest.mark.parametrize("line", ["/tree", "/switch", "/stats", "/tokens", "/template", "/sessions", "/system", "/set"])
def test_what_only_shows_works_before_the_first_turn(front: Recorder, line: str) -> None:
    assert front.run(line).strip()


@pytest.mark.parametrize("line", ["/quit", "/exit", "/q"])
def test_quit(front: Recorder, line: str) -> None:
    front.run(line)
    assert front.done
