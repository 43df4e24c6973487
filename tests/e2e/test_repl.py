"""The REPL as a person meets it: the installed `koala` in a terminal, key by key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from koala_local.chat.history import History, Node
from tests.e2e.terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_J, ENTER, KOALA, Terminal
from tests.gguf_maker import make_model

Open = Callable[..., Terminal]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", name="Tiny", context=1024)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slow enough to be stopped, on fast machines too; greedy, it goes in circles and never ends by itself."""
    path = tmp_path_factory.mktemp("model") / "slow.gguf"
    return make_model(path, name="Slow", context=4096, embedding=384, layers=8, feed_forward=1536)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def koala(home: Path, model: Path) -> Iterator[Open]:
    """Starts `koala chat` and waits for its prompt."""
    running: list[Terminal] = []

    def start(*options: str, model: Path = model, columns: int = 80, **environment: str) -> Terminal:
        defaults = ("--seed", "1", "--max-tokens", "12")
        terminal = Terminal(home, "chat", model, *defaults, *options, columns=columns, **environment)
        running.append(terminal)
        if environment.get("TERM") != "dumb":
            terminal.ready()
        return terminal

    yield start
    for terminal in running:
        terminal.kill()


def saved(home: Path) -> list[Node]:
    """The turns of the session last talked in."""
    history = History.open(home / "data")
    _, nodes = history.load(history.sessions()[0].id)
    history.close()
    return nodes


def test_a_conversation_with_its_commands(koala: Open, home: Path) -> None:
    terminal = koala()
    assert "Tiny" in terminal.text
    assert "/help" in terminal.text
    terminal.send("first message")
    terminal.send("second message")
    assert re.search(r"reused \d+ of \d+", terminal.bar)
    terminal.send("/regen")
    assert len(saved(home)) == 3
    assert "turn 2" in terminal.send("/undo")
    terminal.keys("/edit 1\r")
    terminal.wait(lambda: terminal.typed == "turn 1 > first message", "the old text to edit")
    terminal.keys(" changed\r")
    terminal.wait(lambda: bool(terminal.bar) and terminal.typed == ">", "the prompt after the edit")
    assert saved(home)[-1].user == "first message changed"
    assert "/switch here" in terminal.send("/branch 1 here")
    terminal.send("another line")
    assert "first message changed" in terminal.send("/switch here")
    tree = terminal.send("/tree")
    assert "> 1 [3 here] first message changed" in tree
    assert all(text in tree for text in ("1] second message", "2] second message", "4] another line"))
    tokens = terminal.send("/tokens")
    assert tokens.splitlines()[0].split() == ["control", "1", "<s>"]
    assert "did you mean /stats" in terminal.send("/stat")
    terminal.keys(CTRL_D)
    assert terminal.end() == 0


def test_several_lines_are_one_message(koala: Open, home: Path) -> None:
    terminal = koala()
    terminal.keys("\x1b[200~pasted one\r\n  pasted two\nthree\x1b[201~")
    terminal.wait(lambda: terminal.typed == "  three", "the pasted text")
    terminal.keys(f"{ALT_ENTER}four{CTRL_J}five")
    terminal.wait(lambda: terminal.typed == "  five", "more lines")
    assert "reused" not in terminal.bar
    terminal.keys(ENTER)
    terminal.wait(lambda: "tokens/s" in terminal.bar, "the reply")
    terminal.keys(ENTER)  # an empty message is none
    terminal.send("/stats")
    assert [node.user for node in saved(home)] == ["pasted one\n  pasted two\nthree\nfour\nfive"]
    history = (home / "data" / "messages").read_text()
    assert "+  pasted two\n" in history
    assert "/stats" not in history


def test_ctrl_c_stops_a_reply_and_leaves_only_when_asked_twice(koala: Open, home: Path, slow_model: Path) -> None:
    terminal = koala("--max-tokens", "0", "--temperature", "0", model=slow_model)
    terminal.keys("hello\r")
    terminal.wait(lambda: not terminal.bar and len(terminal.text.partition("> hello\n")[2]) > 5, "a reply")
    terminal.keys(CTRL_C)
    terminal.wait_for("stopped; what is written is kept")
    terminal.ready()
    (node,) = saved(home)
    assert node.finish == "interrupted"
    assert node.reply

    terminal.keys("half a line")
    terminal.wait_for("half a line")
    terminal.keys(CTRL_C)
    terminal.ready()
    assert "again leaves" not in terminal.text
    assert "half a line" not in terminal.text
    terminal.keys(CTRL_C)
    terminal.wait_for("Ctrl-C again leaves")
    terminal.keys("x" + CTRL_C)
    terminal.ready()
    terminal.keys(CTRL_C)
    terminal.wait(lambda: terminal.text.count("again leaves") == 2, "the second hint")
    terminal.keys(CTRL_C)
    assert terminal.end() == 0


def test_what_is_typed_during_a_reply_is_in_the_next_prompt(koala: Open, slow_model: Path) -> None:
    terminal = koala("--max-tokens", "60", "--temperature", "0", model=slow_model)
    terminal.keys("hello\r")
    terminal.wait(lambda: not terminal.bar and len(terminal.text.partition("> hello\n")[2]) > 5, "a reply")
    terminal.keys("typed meanwhile")
    terminal.wait(lambda: terminal.typed == "> typed meanwhile", "what was typed")
    assert terminal.text.count("typed meanwhile") == 1


def test_what_is_typed_before_a_reply_is_stopped_stays(koala: Open, slow_model: Path) -> None:
    terminal = koala("--max-tokens", "0", "--temperature", "0", model=slow_model)
    terminal.keys("hello\r")
    terminal.wait(lambda: not terminal.bar and len(terminal.text.partition("> hello\n")[2]) > 5, "a reply")
    terminal.keys("typed meanwhile")
    terminal.keys(CTRL_C)
    terminal.wait_for("stopped; what is written is kept")
    terminal.wait(lambda: terminal.typed == "> typed meanwhile", "what was typed")


def test_a_long_message_that_is_refused_does_not_hide_why(koala: Open) -> None:
    terminal = koala()
    terminal.keys("y " * 1500 + "\r")
    terminal.wait_for("arrow up brings the message")
    terminal.ready()
    assert "context holds 1024" in terminal.text
    terminal.keys("\x1b[A")
    terminal.wait(lambda: "y y y" in terminal.typed, "the message")


def test_lines_that_are_sent_all_at_once_are_taken_one_by_one(koala: Open, home: Path) -> None:
    terminal = koala()
    for line in ("first", "second", "/undo", "third"):
        terminal.keys(f"{line}\r")  # without waiting for anything
    terminal.wait(lambda: "> third" in terminal.lines and terminal.typed == ">" and bool(terminal.bar), "all of them")
    assert [node.user for node in saved(home)] == ["first", "second", "third"]


def test_what_is_typed_while_the_model_is_loaded_is_sent(koala: Open, home: Path, model: Path) -> None:
    terminal = Terminal(home, "chat", model, "--seed", "1", "--max-tokens", "4")
    terminal.quiet()
    terminal.keys("early\r")
    terminal.wait(lambda: "tokens/s" in terminal.bar, "the reply")
    assert [node.user for node in saved(home)] == ["early"]
    terminal.kill()


def test_ctrl_c_while_the_prompt_is_read_gives_the_message_back(koala: Open, home: Path, slow_model: Path) -> None:
    (home.parent / "long.txt").write_text("word " * 740)
    terminal = koala(model=slow_model)
    terminal.send("/attach long.txt")
    terminal.keys("what is it about?\r")
    terminal.wait_for("read ")
    terminal.keys("typed meanwhile\r" + CTRL_C)
    terminal.wait_for("stopped before the first token")
    terminal.wait(lambda: terminal.typed == "> what is it about?" and bool(terminal.bar), "the message in the prompt")
    assert "read " not in terminal.text.replace("already", "")
    assert History.open(home / "data").sessions() == []


def test_replies_go_into_a_file_and_the_prompt_does_not(home: Path, model: Path) -> None:
    command = f"exec {KOALA} chat {model} --seed 1 --max-tokens 4 > out.txt"
    environment = dict(os.environ) | {"KOALA_HOME": str(home), "TERM": "xterm"}
    child = pexpect.spawn("/bin/sh", ["-c", command], env=environment, cwd=home.parent, timeout=30)
    child.expect_exact("\x1b[6n")  # where is the cursor?
    child.send("\x1b[1;1R")
    child.expect("0/1024")
    child.send("hello\r")
    child.expect_exact("\x1b[6n")
    child.send("\x1b[1;1R")
    child.expect("tokens/s")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    written = (home.parent / "out.txt").read_text()
    assert "Tiny" in written
    assert f"\n\n{saved(home)[0].reply.split()[0]}" in written
    assert not any(text in written for text in ("hello", "tokens/s", "0/1024", "\x1b"))


def test_resume(koala: Open) -> None:
    terminal = koala()
    terminal.send("remember this")
    terminal.send("/rename My title")
    terminal.keys(CTRL_D)
    assert terminal.end() == 0
    terminal = koala("--resume")
    assert "> remember this" in terminal.lines
    assert "My title" in terminal.bar
    terminal.send("/new")
    assert "My title" in terminal.send("/resume")
    terminal.send("and on")
    assert re.search(r"reused [1-9]\d* of", terminal.bar)


def test_forty_columns_and_another_width(koala: Open) -> None:
    terminal = koala(columns=40)
    terminal.send("a message that is longer than one line of this terminal")
    for command in ("/help", "/stats", "/tree", "/sessions", "/tokens", "/template", "/model"):
        assert terminal.send(command)
    assert len(terminal.bar) <= 40
    assert "tokens/s" in terminal.bar
    terminal.resize(80)
    terminal.wait(lambda: "reused" in terminal.bar, "a longer bar")
    terminal.send("one more")


def test_completion(koala: Open) -> None:
    terminal = koala()
    terminal.keys("/reg")
    terminal.wait_for("another reply")
    terminal.keys("\t")
    terminal.wait(lambda: terminal.typed == "> /regen", "the completed command")
    terminal.keys(CTRL_C + "/set temp")
    terminal.wait(lambda: "0.7" in terminal.text, "the setting's present value")
    terminal.keys("\t")
    terminal.wait(lambda: terminal.typed == "> /set temperature", "the completed setting")
    terminal.keys("0.3\r")
    terminal.wait_for("temperature     0.3")
    terminal.ready()
    terminal.keys("/template alp")
    terminal.wait_for("> /template alp")
    terminal.keys("\t")
    terminal.wait(lambda: terminal.typed == "> /template alpaca", "the completed format")


def test_no_color(koala: Open) -> None:
    terminal = koala(NO_COLOR="1")
    terminal.send("hello")
    terminal.send("/tokens")
    terminal.send("/nonsense")
    colours = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
    assert not colours.search(terminal.raw)
    coloured = koala()
    coloured.send("/nonsense")
    assert colours.search(coloured.raw)


def test_a_dumb_terminal(koala: Open, home: Path) -> None:
    terminal = koala(TERM="dumb")
    terminal.wait(lambda: terminal.typed == ">", "a prompt")
    terminal.keys("hello\r")
    terminal.wait(lambda: terminal.typed == ">" and len(terminal.lines) > 6, "a reply")
    terminal.keys("/undo\r")
    terminal.wait_for("undone: turn 1")
    terminal.keys("half a line" + CTRL_C)
    terminal.wait_for("Ctrl-C again leaves")
    terminal.keys(CTRL_C)
    assert terminal.end() == 0
    assert b"\x1b" not in terminal.raw
    assert [node.user for node in saved(home)] == ["hello"]
