"""The commands that walk in the tree of turns."""

from __future__ import annotations

import pytest

from koala_local.chat.front import Unsent, say
from koala_local.engine.sampling import Sampling
from koala_local.errors import ContextError, KoalaError
from tests.unit.chat.recorder import Recorder, users


def test_system(front: Recorder) -> None:
    assert "no system text" in front.run("/system")
    assert "trained without" in front.run("/system Be brief.\nAlways.")
    assert front.conversation.system == "Be brief.\nAlways."
    assert front.run("/system") == "Be brief.\nAlways."
    assert "trained without" not in front.run("/system Be kind.")
    with pytest.raises(ContextError):
        front.run("/system " + "long " * 500)
    assert front.conversation.system == "Be kind."
    front.run("/system none")
    assert front.conversation.system == ""


def test_regen_edit_and_undo(front: Recorder) -> None:
    for text in ("one", "two", "three"):
        say(front, text)
    front.run("/regen")
    assert users(front) == ["one", "two", "three"]
    assert front.last is not None
    assert front.last.stats.evaluated_tokens == 1
    front.run("/edit 2 zwei\nund mehr")
    assert users(front) == ["one", "zwei\nund mehr"]
    front.run("/edit drei")
    assert users(front) == ["one", "drei"]
    assert "turn 2" in front.run("/undo")
    assert users(front) == ["one"]
    assert len(front.conversation.nodes) == 6


def test_edit_without_a_text_asks_with_the_old_one(front: Recorder) -> None:
    say(front, "one")
    say(front, "two")
    front.replacement = "uno"
    front.run("/edit 1")
    assert (front.asked, users(front)) == ("one", ["uno"])
    front.replacement = None
    with pytest.raises(KoalaError, match="nothing is changed"):
        front.run("/edit")
    assert users(front) == ["uno"]
    with pytest.raises(KoalaError, match="no turn 2024") as caught:
        front.run("/edit 2024 was a good year")
    assert "/edit 1 2024 was a good year" in caught.value.hint


def test_an_interrupted_edit_can_be_typed_again(front: Recorder) -> None:
    say(front, "one")
    front.replacement, front.interrupted = "uno", True
    with pytest.raises(Unsent) as caught:
        front.run("/edit")
    assert caught.value.line == "/edit 1 uno"
    assert users(front) == ["one"]


def test_branch_switch_and_tree(front: Recorder) -> None:
    for text in ("one", "two"):
        say(front, text)
    assert "main line" in front.run("/branch 1 main line")
    say(front, "another two")
    tree = front.run("/tree")
    assert "[1 main line] two" in tree
    assert "> 2 [2] another two" in tree
    assert "* 1 one" in tree
    assert "main line: two" in front.run("/switch")
    assert "two" in front.run("/switch main line")
    assert users(front) == ["one", "two"]
    front.run("/switch 2")
    assert users(front) == ["one", "another two"]
    front.run("/branch 0")
    assert users(front) == []
    with pytest.raises(KoalaError):
        front.run("/switch nowhere")
    front.run("/switch 1")
    with pytest.raises(KoalaError, match="called"):
        front.run("/branch 1 7")


def test_branching_in_the_middle_of_a_line(front: Recorder) -> None:
    for text in ("one", "two", "three"):
        say(front, text)
    front.run("/undo")
    assert "behind turn 1" in front.run("/branch 1")
    assert users(front) == ["one"]


def test_a_tree_of_many_forks_fits(front: Recorder) -> None:
    conversation = front.conversation
    conversation.sampling = Sampling(max_tokens=1)
    for number in range(20):
        say(front, f"turn {number}")
        front.run("/regen")
    lines = front.run("/tree").splitlines()
    assert sum("-> " in line for line in lines) == 40
    assert next(line for line in lines if "turn 19" in line).startswith("├── ")


def test_what_forks_off_the_line_is_indented_below_its_turn(front: Recorder) -> None:
    for text in ("one", "two", "/edit 1 eins", "/regen", "zwei", "/regen", "/undo", "drei", "/switch 1", "three"):
        front.run(text) if text.startswith("/") else say(front, text)
    lines = [line for line in front.run("/tree").splitlines() if "──" in line]
    assert [line.index("──") // 4 for line in lines] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [line.split(" ->")[0].split()[-1] for line in lines] == [
        "eins",
        "eins",
        "zwei",
        "zwei",
        "drei",
        "one",
        "two",
        "three",
    ]


def test_a_tree_of_forks_upon_forks_fits(front: Recorder) -> None:
    front.conversation.sampling = Sampling(max_tokens=1)
    for number in range(10):
        say(front, f"turn {number}")
        say(front, "more")
        front.run("/undo")
        front.run("/regen")
    front.run("/branch 0")
    assert "turn 9" in front.run("/tree")
