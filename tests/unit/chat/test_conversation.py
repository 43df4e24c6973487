"""The tree of a conversation: every walk in it costs only what differs, and all of it is there on resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from koala_local.chat.conversation import Conversation
from koala_local.chat.history import History
from koala_local.chat.kv_files import KvFiles
from koala_local.chat.ledger import Ledger
from koala_local.chat.saved import reply_seed
from koala_local.chat.template import JinjaFormat
from koala_local.dialogue import FORMATS, KOALA
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling
from koala_local.errors import KoalaError, SessionError, TemplateError
from tests.engines import tiny_engine

Open = Callable[..., Conversation]


def quiet(text: str) -> None: ...


def refuse(*_: object, **__: object) -> NoReturn:
    raise SessionError("the disk is full")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"))
    yield engine
    engine.close()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def open_chat(engine: LlamaEngine, tmp_path: Path, notes: list[str]) -> Open:
    def build(engine: LlamaEngine = engine, folder: Path = tmp_path, **options: object) -> Conversation:
        return Conversation(
            Ledger(engine, KOALA),
            History.open(folder),
            KvFiles(folder / "kv"),
            model="tiny",
            sampling=Sampling(temperature=1.0, max_tokens=10),
            note=notes.append,
            **({"seed": 1} | options),  # type: ignore[arg-type]
        )

    return build


def evaluated(chat: Conversation, act: Callable[[], object]) -> int:
    """Tokens evaluated before replies by `act`."""
    engine, before = chat.ledger.engine, chat.ledger.engine.evaluated_tokens
    answer = act()
    return getattr(getattr(answer, "stats", None), "evaluated_tokens", engine.evaluated_tokens - before)


def own(chat: Conversation, text: str) -> int:
    return len(chat.ledger.engine.tokenize(f"USER: {text} GPT:"))


def test_regenerate_keeps_both_replies(open_chat: Open) -> None:
    chat = open_chat()
    chat.send("hello", quiet)
    first = chat.path()[-1]
    assert evaluated(chat, lambda: chat.regenerate(quiet)) == 1
    second = chat.path()[-1]
    assert (second.parent, second.attempt, first.attempt) == (None, 1, 0)
    assert second.reply_ids != first.reply_ids
    assert len(chat.branches()) == 2


def test_a_run_repeats(open_chat: Open, tmp_path: Path) -> None:
    def run(folder: Path) -> list[str]:
        chat = open_chat(folder=folder)
        replies = [chat.send("a", quiet).text, chat.regenerate(quiet).text, chat.send("b", quiet).text]
        chat.history.close()
        return replies

    assert run(tmp_path / "one") == run(tmp_path / "two")


def test_seeds_differ_by_session_turn_and_attempt() -> None:
    seeds = {reply_seed(session, turn, attempt) for session in (1, 2) for turn in range(20) for attempt in range(20)}
    assert len(seeds) == 2 * 20 * 20


def test_undo_edit_and_switch(open_chat: Open) -> None:
    chat = open_chat()
    for text in ("one", "two", "three"):
        chat.send(text, quiet)
    long_path = chat.path()
    assert chat.undo() == long_path[-1]
    assert evaluated(chat, lambda: chat.send("else", quiet)) <= own(chat, "else")
    assert [node.user for node in chat.path()] == ["one", "two", "else"]
    assert evaluated(chat, lambda: chat.edit(2, "2", quiet)) <= own(chat, "2")
    assert [node.user for node in chat.path()] == ["one", "2"]
    back = next(branch for branch in chat.branches() if branch.last.id == long_path[-1].id)
    assert evaluated(chat, lambda: chat.switch(str(back.number))) == 0
    assert chat.path() == long_path
    assert evaluated(chat, lambda: chat.send("four", quiet)) == own(chat, "four")


def test_branches_by_name(open_chat: Open) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    chat.send("two", quiet)
    chat.branch(1, "first try")
    assert [node.user for node in chat.path()] == ["one"]
    chat.send("other", quiet)
    chat.switch("first try")
    assert [node.user for node in chat.path()] == ["one", "two"]
    with pytest.raises(KoalaError, match="already"):
        chat.branch(None, "first try")
    with pytest.raises(KoalaError, match="called first try"):
        chat.branch(None, "second name")  # the first would be lost
    with pytest.raises(KoalaError, match="no branch"):
        chat.switch("nowhere")


def test_a_line_keeps_its_number(open_chat: Open) -> None:
    chat = open_chat()
    for text in ("one", "two", "three"):
        chat.send(text, quiet)
    end = chat.head
    chat.branch(1)
    chat.send("other", quiet)
    chat.send("and more", quiet)
    lines = [(branch.number, branch.turns, branch.current) for branch in chat.branches()]
    assert lines == [(1, 3, False), (2, 3, True)]
    assert chat.switch("1").last.id == end
    chat.branch(None, "kept")
    chat.send("behind a named end", quiet)
    assert [branch.number for branch in chat.branches() if branch.current] == [3]
    assert chat.switch("kept").last.id == end
    chat.undo()
    assert [branch.number for branch in chat.branches() if branch.current] == [1]


def test_resume_evaluates_nothing_old(open_chat: Open, notes: list[str]) -> None:
    chat = open_chat()
    for text in ("one", "two", "three"):
        chat.send(text, quiet)
    saved, path = chat.session, chat.path()
    chat.save()
    assert saved is not None
    chat.history.close()
    chat._unlock()

    again = open_chat()
    again.resume(saved.id[:4])
    assert again.path() == path
    assert notes == []
    assert evaluated(again, lambda: again.send("four", quiet)) == own(again, "four")


def test_resume_without_a_kv_file_says_why_and_works(open_chat: Open, notes: list[str], tmp_path: Path) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    assert chat.session is not None
    chat.history.close()
    chat._unlock()
    again = open_chat()
    again.resume(chat.session.id)
    assert "no KV cache was saved" in notes[0]
    answer = again.send("two", quiet)
    assert answer.stats.reused_tokens == 0
    assert answer.stats.evaluated_tokens > own(again, "two")


def test_a_second_program_opens_a_branch(open_chat: Open, notes: list[str], tmp_path: Path) -> None:
    first = open_chat(engine=tiny_engine(tmp_path))
    first.send("one", quiet)
    assert first.session is not None
    second = open_chat()
    second.resume(first.session.id)
    assert "another window" in notes[0]
    second.send("from the second", quiet)
    head = first.send("from the first", quiet) and first.head
    session, nodes = first.history.load(first.session.id)
    assert session.head == head
    assert {node.user for node in nodes} == {"one", "from the first", "from the second"}
    assert not (second.files._folder / f"{first.session.id}.kv").exists()
    second.save()
    assert not (second.files._folder / f"{first.session.id}.kv").exists()
    with pytest.raises(KoalaError, match="another window"):
        second.rename("a title")
    second.set_system("Be brief.")
    assert "not saved" in notes[-1]
    assert (first.history.load(first.session.id)[0].system, second.system) == ("", "Be brief.")


def test_another_format_keeps_the_text(open_chat: Open) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    chat.use_format(FORMATS["vicuna-v1.1"])
    assert chat.exchanges(chat.path())[0].reply_ids is None
    answer = chat.send("two", quiet)
    assert answer.stats.reused_tokens < 10
    chat.use_format(KOALA)
    assert [node.user for node in chat.path()] == ["one", "two"]


def test_another_model_keeps_the_conversation(open_chat: Open, tmp_path: Path) -> None:
    chat = open_chat(engine=tiny_engine(tmp_path))
    chat.send("one", quiet)
    chat.use_model(
        lambda: Ledger(tiny_engine(tmp_path, seed=5, extra_tokens=[("<|x|>", 3)]), KOALA),
        "other",
        lambda: pytest.fail("the new model loads"),
    )
    assert chat.model == "other"
    assert chat.send("two", quiet).stats.reused_tokens == 0
    assert [node.user for node in chat.path()] == ["one", "two"]

    def broken() -> Ledger:
        raise KoalaError("no such model")

    with pytest.raises(KoalaError, match="no such model"):
        chat.use_model(
            broken, "broken", lambda: Ledger(tiny_engine(tmp_path, seed=5, extra_tokens=[("<|x|>", 3)]), KOALA)
        )
    assert chat.send("three", quiet).stats.prompt_tokens > 0
    chat.close()


def test_a_disk_that_refuses_does_not_end_the_chat(
    open_chat: Open, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_chat()
    chat.send("one", quiet)

    monkeypatch.setattr(chat.history, "add_turn", refuse)
    chat.send("two", quiet)
    assert notes == ["from here on turns are not saved: the disk is full"]
    chat.regenerate(quiet)
    monkeypatch.undo()
    chat.send("three", quiet)
    assert [node.user for node in chat.path()] == ["one", "two", "three"]
    assert chat.session is not None
    session, nodes = chat.history.load(chat.session.id)
    assert [node.user for node in nodes] == ["one", "two", "two", "three"]
    assert {node.id: node for node in nodes} == chat.nodes
    assert session.head == chat.head
    assert notes[1:] == ["all turns are saved again"]


def test_turns_that_cannot_be_saved_are_told_of_before_they_are_left(
    open_chat: Open, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    assert chat.session is not None
    session = chat.session.id
    with monkeypatch.context() as broken:
        broken.setattr(chat.history, "_check_file", refuse)
        chat.send("two", quiet)
    chat.resume(session)  # the disk has room again
    assert [node.user for node in chat.path()] == ["one", "two"]
    with monkeypatch.context() as broken:
        broken.setattr(chat.history, "_check_file", refuse)
        chat.send("three", quiet)
        notes.clear()
        chat.new()
    assert notes == ["1 turn is lost: the disk refused"]


def test_a_waiting_turn_is_saved_once(open_chat: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    with monkeypatch.context() as broken:
        broken.setattr(chat.history, "_check_file", refuse)
        chat.send("two", quiet)
        chat.branch(None, "kept")
    with monkeypatch.context() as broken:
        broken.setattr(chat.history, "name_node", refuse)
        chat.save()
    chat.save()
    assert chat.session is not None
    nodes = chat.history.load(chat.session.id)[1]
    assert [(node.user, node.name) for node in nodes] == [("one", ""), ("two", "kept")]


def test_the_user_is_told_which_turns_left(open_chat: Open, notes: list[str]) -> None:
    chat = open_chat()
    while not notes:
        chat.send("something to say that takes a few tokens", quiet)
    assert notes[0].startswith("the context is full: turns 1 to ")
    chat.regenerate(quiet)
    assert len(notes) == 1  # not again for another reply at the same place
    assert chat.path()[-1].dropped > 0


def test_turns_are_seen_again_where_the_prompt_is_made_anew(open_chat: Open, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    chat = open_chat(engine=tiny_engine(tmp_path / "small", context=256))
    while not chat.path() or not chat.path()[-1].dropped:
        chat.send("something to say that takes a few tokens", quiet)
    assert chat.session is not None
    turns = len(chat.path())
    larger = tiny_engine(tmp_path / "small", context=1024)
    chat.use_model(lambda: Ledger(larger, KOALA), "larger", lambda: pytest.fail("the new model loads"))
    assert {node.dropped for node in chat.history.load(chat.session.id)[1]} == {0}
    answer = chat.send("and now", quiet)
    assert (answer.stats.dropped_turns, answer.stats.prompt_tokens > 256, len(chat.path())) == (0, True, turns + 1)
    chat.close()


@pytest.mark.parametrize("dropped", [5, -1, 2**62])
def test_a_damaged_count_of_turns_that_left_keeps_the_message(open_chat: Open, dropped: int) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    (number,) = chat.nodes
    chat.nodes[number] = chat.nodes[number]._replace(dropped=dropped)
    prompt = chat.send("two", quiet).stats.prompt_tokens
    assert prompt > own(chat, "two")


def test_where_a_template_fails_the_walk_is_made_and_the_message_refused(open_chat: Open) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.content == 'apple' %}{{ raise_exception('none') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = open_chat()
    chat.send("apple", quiet)
    chat.undo()
    chat.send("pear", quiet)
    with JinjaFormat(source, name="j", specials=set(), bos_text="<s>", eos_text="</s>", add_bos=True) as format:
        chat.use_format(format)
        chat.switch("1")
        assert [node.user for node in chat.path()] == ["apple"]
        with pytest.raises(TemplateError):
            chat.send("on", quiet)
        assert [node.user for node in chat.path()] == ["apple"]
        chat.switch("2")
        assert chat.send("on", quiet).stats.prompt_tokens > 0


def test_new_leaves_the_old_session_saved(open_chat: Open) -> None:
    chat = open_chat(system="Be kind.")
    chat.send("one", quiet)
    old = chat.session
    chat.new()
    assert (chat.path(), chat.session, chat.system) == ([], None, "Be kind.")
    assert old is not None
    assert chat.history.load(old.id)[1][0].user == "one"


def test_turns_that_waited_are_saved_before_another_session_begins(
    open_chat: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    with monkeypatch.context() as broken:
        broken.setattr(chat.history, "add_turn", refuse)
        chat.send("two", quiet)
        chat.branch(None, "kept")
    session = chat.session
    chat.new()
    assert session is not None
    nodes = chat.history.load(session.id)[1]
    assert [(node.user, node.name) for node in nodes] == [("one", ""), ("two", "kept")]


def test_what_makes_the_next_reply_slow_is_told(open_chat: Open, notes: list[str]) -> None:
    chat = open_chat()
    chat.set_system("Be brief.")
    assert notes == []  # nothing has been said: nothing to evaluate again
    chat.send("one", quiet)
    chat.set_system("Be brief.")
    assert notes == []
    chat.set_system("Be long.")
    chat.use_format(FORMATS["chatml"])
    assert [note.partition(": ")[2] for note in notes] == ["the system text changed", "the prompt format changed"]
    assert all("evaluates the conversation again" in note for note in notes)


def test_damaged_ids_are_made_anew_from_the_text(open_chat: Open) -> None:
    chat = open_chat()
    chat.send("one", quiet)
    (number,) = chat.nodes
    chat.nodes[number] = chat.nodes[number]._replace(reply_ids=(0x7FFFFFFF,))
    assert chat.exchanges(chat.path())[0].reply_ids is None
    assert chat.send("two", quiet).stats.prompt_tokens > 0


def test_a_format_is_taken_up_on_resume_and_cold_tokens_are_told(open_chat: Open, notes: list[str]) -> None:
    chat = open_chat()
    chat.use_format(FORMATS["vicuna-v1.1"])
    chat.send("one", quiet)
    chat.save()
    chat.send("two", quiet)  # after the last save, as when the program is killed
    assert chat.session is not None
    chat._unlock()
    again = open_chat()
    again.resume(chat.session.id)
    assert again.ledger.format.name == "vicuna-v1.1"
    assert "tokens are evaluated again" in notes[-1]


def test_without_any_model_left_there_is_an_error_and_no_crash(open_chat: Open, tmp_path: Path) -> None:
    chat = open_chat(engine=tiny_engine(tmp_path))
    chat.send("one", quiet)

    def broken() -> Ledger:
        raise KoalaError("gone")

    with pytest.raises(KoalaError, match="gone"):
        chat.use_model(broken, "other", broken)
    with pytest.raises(KoalaError, match="no model is loaded"):
        chat.send("two", quiet)
    chat.close()
