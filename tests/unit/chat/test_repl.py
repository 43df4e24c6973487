"""The REPL's loop with keys from a pipe: what a real terminal (tests/e2e/test_repl.py) shows badly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from koala_local.chat import repl as repl_module
from koala_local.chat.bar import bar
from koala_local.chat.commands import COMMANDS
from koala_local.chat.completion import message_history
from koala_local.chat.conversation import Conversation
from koala_local.chat.front import Front
from koala_local.chat.history import History
from koala_local.chat.kv_files import KvFiles
from koala_local.chat.ledger import Ledger
from koala_local.chat.loader import LoadedModel, LoadOptions
from koala_local.chat.repl import Repl
from koala_local.dialogue import KOALA
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling
from koala_local.models.gguf_header import read_header
from tests.engines import tiny_engine

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    folder = tmp_path_factory.mktemp("model")
    engine: LlamaEngine = tiny_engine(folder)
    path = next(folder.glob("*.gguf"))
    yield LoadedModel(path, read_header(path), engine, KOALA, "test")
    engine.close()


@pytest.fixture
def conversation(model: LoadedModel, tmp_path: Path) -> Iterator[Conversation]:
    history = History.open(tmp_path / "data")
    ledger, files = Ledger(model.engine, KOALA), KvFiles(tmp_path / "kv")
    sampling = Sampling(temperature=1.0, max_tokens=6)
    yield Conversation(ledger, history, files, model="tiny", sampling=sampling, note=lambda _: None, seed=1)
    history.close()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    monkeypatch.setenv("TERM", "xterm")
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.fixture
def repl(keys: PipeInput, conversation: Conversation, model: LoadedModel) -> Repl:
    return Repl(conversation, model, LoadOptions())


def test_the_repl_is_a_front(repl: Repl) -> None:
    checked: Front = repl
    assert checked.last is None


def test_idle_saves_the_cache_without_disturbing_the_prompt(
    repl: Repl, keys: PipeInput, conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repl_module, "IDLE_S", 0.05)
    keys.send_text("hello\rhalf")

    def leave_when_saved() -> None:
        wait_until(lambda: any((tmp_path / "kv").glob("*.json")))
        keys.send_text(" and half\r" + CTRL_D)

    run_beside(repl, leave_when_saved)
    assert [node.user for node in conversation.path()] == ["hello", "half and half"]


def test_a_failing_idle_save_is_told_once_at_the_prompt(
    repl: Repl, keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repl_module, "IDLE_S", 0.05)
    (tmp_path / "kv").write_text("no folder")
    keys.send_text("hello\r")
    told = ""

    def is_told() -> bool:
        nonlocal told
        told += capfd.readouterr().out
        return "not saved" in told

    def leave_when_told() -> None:
        wait_until(is_told)
        time.sleep(0.2)
        keys.send_text(CTRL_D)

    run_beside(repl, leave_when_told)
    assert (told + capfd.readouterr().out).count("the KV cache is not saved") == 1


def test_a_defect_in_a_command_does_not_end_the_conversation(
    repl: Repl,
    keys: PipeInput,
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(front: Front, argument: str) -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setitem(COMMANDS, "stats", replace(COMMANDS["stats"], run=broken))
    keys.send_text("/stats\rhello\r" + CTRL_D)
    repl.run()
    assert "internal error: ZeroDivisionError: by zero and more" in capsys.readouterr().out
    assert len(conversation.path()) == 1


def test_a_message_that_does_not_fit_comes_back_to_be_changed(
    repl: Repl, keys: PipeInput, conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.send_text(f"\x1b[200~{'word ' * 600}\x1b[201~\r\x15short\r{CTRL_D}")  # Ctrl-U empties the line
    repl.run()
    assert "the message needs" in capsys.readouterr().out
    assert [node.user for node in conversation.path()] == ["short"]


def test_notes_wait_for_the_end_of_the_reply(
    repl: Repl, keys: PipeInput, conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    send = conversation.send

    def noting_send(*arguments: object) -> object:
        conversation.note("the context\x1b[2J is full")
        return send(*arguments)  # type: ignore[arg-type]

    conversation.send = noting_send  # type: ignore[method-assign, assignment]
    keys.send_text("hello\r" + CTRL_D)
    repl.run()
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == "the context is full"


def test_ctrl_c_at_an_empty_prompt_twice_in_a_row_leaves(
    repl: Repl, keys: PipeInput, conversation: Conversation
) -> None:
    keys.send_text(f"{CTRL_C}hello\r{CTRL_C}x{CTRL_C}{CTRL_C}{CTRL_C}never read\r")
    repl.run()
    assert [node.user for node in conversation.path()] == ["hello"]


def test_messages_are_remembered_for_their_owner_only(tmp_path: Path) -> None:
    history = message_history(tmp_path / "data")
    for line in ("one\ntwo", "/stats", "//slash", "x" * 100_000):
        history.append_string(line)
    path = tmp_path / "data" / "messages"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(message_history(tmp_path / "data").load_history_strings()) == ["//slash", "one\ntwo"]
    assert isinstance(message_history(path), InMemoryHistory)


@pytest.mark.parametrize("width", range(4, 120, 3))
def test_the_bar_fits_and_keeps_what_matters_most(width: int) -> None:
    fields = [(3, "模型模型"), (5, "koala"), (1, "123/4096"), (2, "██░░░░"), (4, "20 tokens/s"), (6, "reused 3 of 4")]
    line = bar(fields, width)
    assert len(line) + line.count("模型") * 2 < width
    assert ("123/4096" in line) == (width > 9)
    assert ("reused" in line) <= ("tokens/s" in line) <= ("模型" in line)


def run_beside(repl: Repl, act: Callable[[], None]) -> None:
    """Run the REPL here, and `act` in another thread."""
    thread = threading.Thread(target=act)
    thread.start()
    repl.run()
    thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
