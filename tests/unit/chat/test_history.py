"""Saved conversations: what was written is there again, as a tree, for its owner only, for any number of programs."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koala_local.chat.history import History
from koala_local.errors import SessionError
from tests.unit.chat.turns import REPOSITORY, begin, filled, say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def history(folder: Path) -> Iterator[History]:
    opened = History.open(folder)
    yield opened
    opened.close()


def reopened(history: History, folder: Path) -> History:
    history.close()
    return History.open(folder)


# -- what is written is there again


def test_a_session_comes_back_as_it_was(history: History, folder: Path) -> None:
    session = begin(history, system="be brief", seed=2**62, model="m", format="chatml")
    first = say(
        history, session, user="a\0b é 你好 👋\r\n", reply="", finish="interrupted", reply_ids=[0, 1, 2**31 - 1]
    )
    second = say(history, session, first.id, attempt=3, dropped=7, vocabulary="other", reply_ids=())
    again = reopened(history, folder)
    loaded, nodes = again.load(session.id)
    assert nodes == [first, second]
    assert nodes[0].user == "a\0b é 你好 👋\r\n" and nodes[0].reply_ids == (0, 1, 2**31 - 1)
    assert (nodes[1].attempt, nodes[1].dropped, nodes[1].vocabulary) == (3, 7, "other")
    assert (loaded.system, loaded.seed, loaded.model, loaded.format) == ("be brief", 2**62, "m", "chatml")
    assert loaded.head == second.id and loaded.updated >= loaded.created > 0
    assert again.warning == "" and again.path == folder / "sessions.db"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user=st.text(), reply=st.text(), ids=st.lists(st.integers(0, 2**31 - 1)))
def test_any_text_and_ids_round_trip(history: History, user: str, reply: str, ids: list[int]) -> None:
    session = begin(history)
    node = say(history, session, user=user, reply=reply, reply_ids=ids)
    assert history.load(session.id)[1] == [node]
    assert (node.user, node.reply, node.reply_ids) == (user, reply, tuple(ids))


def test_half_a_surrogate_pair_does_not_lose_the_turn(history: History) -> None:
    session = begin(history, system="\udcff")
    node = say(history, session, user="a\ud800b")
    assert node.user == "a?b" and history.load(session.id)[1] == [node]


def test_a_tree_with_branches(history: History) -> None:
    session = begin(history)
    root = say(history, session)
    left, right = say(history, session, root.id), say(history, session, root.id, attempt=1, move_head=False)
    history.name_node(right.id, "other way")
    loaded, nodes = history.load(session.id)
    assert [node.parent for node in nodes] == [None, root.id, root.id]
    assert nodes[2].name == "other way" and loaded.head == left.id
    history.set_head(session.id, right.id)
    assert history.load(session.id)[0].head == right.id
    history.set_head(session.id, None)
    assert history.load(session.id)[0].head is None


def test_a_turn_cannot_hang_on_another_sessions_tree(history: History) -> None:
    mine, other = begin(history), begin(history)
    node, foreign = say(history, mine), say(history, other)
    with pytest.raises(SessionError):
        say(history, mine, foreign.id)
    with pytest.raises(SessionError):
        history.set_head(mine.id, foreign.id)
    with pytest.raises(SessionError):
        history.name_node(999, "nowhere")
    assert history.load(mine.id)[1] == [node] and history.load(mine.id)[0].head == node.id


def test_what_was_never_talked_in_leaves_nothing(history: History, folder: Path) -> None:
    session = begin(history, system="long text")
    history.update(session.id, title="a name", model="other")
    history.set_head(session.id, None)
    assert history.load(session.id) == (history.load(session.id)[0], [])
    assert history.sessions() == [] and history.latest() is None
    say(history, session)
    loaded, _ = history.load(session.id)
    assert (loaded.title, loaded.model, loaded.system) == ("a name", "other", "long text")
    begin(history)
    again = reopened(history, folder)
    assert [summary.id for summary in again.sessions()] == [session.id]


def test_update_changes_only_what_is_given(history: History) -> None:
    session = begin(history, system="old")
    say(history, session)
    history.update(session.id, system="new")
    loaded, _ = history.load(session.id)
    assert (loaded.system, loaded.model, loaded.format) == ("new", "tiny", "koala")
    with pytest.raises(SessionError):
        history.update("gone2345", title="x")


def test_the_list_is_newest_first(history: History) -> None:
    old, new = begin(history, model="m1"), begin(history)
    root = say(history, old, user="what is\n a koala? " + "x" * 100)
    say(history, new)
    history.update(new.id, title="named")
    say(history, old, root.id)
    first, second = history.sessions()
    assert (first.id, first.turns, first.model) == (old.id, 2, "m1")
    assert first.title.startswith("what is a koala? xxx") and len(first.title) == 60
    assert (second.id, second.turns, second.title) == (new.id, 1, "named")
    latest = history.latest()
    assert latest is not None and latest.id == old.id


def test_the_list_counts_the_turns_of_the_line_that_goes_on(history: History) -> None:
    session = begin(history)
    root = say(history, session)
    for _ in range(3):
        say(history, session, root.id)
    assert [summary.turns for summary in history.sessions()] == [2]
    history.set_head(session.id, None)
    assert [summary.turns for summary in history.sessions()] == [0]


def test_ids_are_short_and_found_by_their_beginning(history: History) -> None:
    sessions = [begin(history) for _ in range(40)]
    for session in sessions:
        assert len(session.id) == 8 and session.id.isalnum() and session.id.islower()
        say(history, session)
    wanted = sessions[7].id
    assert history.load(wanted[:7])[0].id == wanted
    assert history.load(f" {wanted.upper()} ")[0].id == wanted
    shared = next(s.id[0] for s in sessions if sum(o.id[0] == s.id[0] for o in sessions) > 1)
    with pytest.raises(SessionError) as ambiguous:
        history.load(shared)
    assert any(s.id in ambiguous.value.hint for s in sessions if s.id[0] == shared)
    mistyped = wanted[:3] + "1" + wanted[4:]  # base32 has no 1
    with pytest.raises(SessionError) as missing:
        history.load(mistyped)
    assert wanted in missing.value.hint
    for nonsense in ("", "%", "_", "../../x", "' OR 1=1 --", "\udc80"):
        with pytest.raises(SessionError):
            history.load(nonsense)


def test_remove_a_session_of_many_turns(history: History) -> None:
    session, other = begin(history), begin(history)
    parent = None
    history._connection.execute("PRAGMA synchronous = OFF")
    for _ in range(1100):  # more than SQLite's limit of nested triggers
        parent = say(history, session, parent).id
    kept = say(history, other)
    history.remove(session.id)
    assert [summary.id for summary in history.sessions()] == [other.id]
    assert say(history, other).id > kept.id > (parent or 0)
    for gone in (session.id, "\ud800"):
        with pytest.raises(SessionError):
            history.remove(gone)
    with pytest.raises(SessionError):
        say(history, session)


def test_settings(history: History, folder: Path) -> None:
    assert history.setting("model") is None
    history.set_setting("model", "a")
    history.set_setting("model", "b")
    assert reopened(history, folder).setting("model") == "b"


def test_only_the_owner_may_look(history: History, folder: Path) -> None:
    say(history, begin(history))
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"sessions.db", "sessions.db-wal", "sessions.db-shm"}
    assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o600"] * len(files)
    (folder / "sessions.db").chmod(0o644)
    reopened(history, folder).close()
    assert (folder / "sessions.db").stat().st_mode & 0o777 == 0o600


def test_any_thread_may_write(history: History) -> None:
    session = begin(history)
    say(history, session)
    threads = [threading.Thread(target=lambda: [say(history, session) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.load(session.id)[1]) == 81


def test_two_programs_at_once(history: History, folder: Path) -> None:
    second = History.open(folder)
    session = begin(history)
    first = say(history, session)
    assert second.load(session.id)[1] == [first]
    assert say(second, session, first.id).parent == first.id
    second.remove(session.id)
    with pytest.raises(SessionError):
        say(history, session, first.id)
    second.close()
    say(history, begin(history))


# -- the lock of a session


def test_a_second_program_notices_the_first(history: History, folder: Path) -> None:
    second = History.open(folder)
    held = history.lock("aaaa2222")
    assert held is not None and second.lock("aaaa2222") is None
    other = second.lock("bbbb2222")
    assert other is not None
    held.release()
    held.release()
    with second.lock("aaaa2222") or pytest.fail("it was released"):
        assert history.lock("aaaa2222") is None
    other.release()
    assert list((folder / "locks").iterdir()) == []
    with pytest.raises(SessionError):
        history.lock("../sessions")


def test_a_lock_ends_with_its_process(history: History, folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from koala_local.chat.history import History\n"
        "held = History.open(Path(sys.argv[1])).lock('aaaa2222'); print(held is not None, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as child:
        assert child.stdout is not None and child.stdout.readline() == "True\n"
        assert history.lock("aaaa2222") is None
        child.kill()
    held = history.lock("aaaa2222")
    assert held is not None
    held.release()


# -- reading and writing that fails


@pytest.mark.parametrize(
    ("statement", "loads"),
    [
        ("UPDATE node SET reply_ids = x'010203'", True),
        ("UPDATE node SET reply_ids = 'text'", True),
        ("UPDATE node SET reply_ids = x'ffffffff'", True),
        ("UPDATE node SET user = CAST(x'ff41' AS TEXT)", True),
        ("UPDATE session SET head = 77", True),
        ("UPDATE node SET user = x'41'", False),
        ("UPDATE node SET attempt = 'many'", False),
        ("UPDATE node SET parent = id", False),
        ("UPDATE node SET parent = 2 WHERE id = 1", False),
        ("UPDATE session SET system = x'41'", False),
        ("UPDATE session SET seed = 'x'", False),
    ],
)
def test_rows_are_checked_when_read(folder: Path, statement: str, loads: bool) -> None:
    file = filled(folder, turns=2)
    connection = sqlite3.connect(file)
    connection.execute(statement)
    connection.commit()
    connection.close()
    history = History.open(folder)
    (summary,) = history.sessions()
    if not loads:
        with pytest.raises(SessionError):
            history.load(summary.id)
        return
    session, nodes = history.load(summary.id)
    assert session.head == nodes[1].id
    assert nodes[0].reply_ids == (() if "reply_ids" in statement else tuple(range(300)))
    history.close()


def test_a_write_that_fails_changes_nothing_and_can_be_repeated(folder: Path) -> None:
    history = History.open(folder)
    session = begin(history)
    first = say(history, session)
    blocker = sqlite3.connect(folder / "sessions.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    history._connection.execute("PRAGMA busy_timeout = 50")
    fresh = begin(history)
    for target in (session, fresh):
        with pytest.raises(SessionError) as locked:
            say(history, target)
        assert "another program" in locked.value.hint
    blocker.execute("ROLLBACK")
    blocker.close()
    assert history.load(session.id)[1] == [first]
    second, third = say(history, session, first.id), say(history, fresh)
    assert history.load(session.id)[1] == [first, second] and history.load(fresh.id)[1] == [third]
    for ids in ([-1], [2**32], [2**70]):
        with pytest.raises(SessionError):
            say(history, session, reply_ids=ids)
    with pytest.raises(SessionError):
        say(history, begin(history, seed=2**64))
    history.close()
    with pytest.raises(SessionError):
        say(history, session)


def test_a_history_that_can_only_be_read_refuses_every_change(folder: Path) -> None:
    history = History.open(folder)
    session = begin(history)
    node = say(history, session)
    history.set_setting("model", "a")
    history = reopened(history, folder)
    before = history.load(session.id)
    history.close()
    (folder / "sessions.lock").unlink()
    (folder / "sessions.lock").mkdir()  # nothing is written where it cannot be locked, also by root
    history = History.open(folder)
    changes: list[Callable[[], object]] = [
        lambda: say(history, session, node.id),
        lambda: say(history, begin(history)),
        lambda: history.set_head(session.id, None),
        lambda: history.update(session.id, title="x"),
        lambda: history.name_node(node.id, "x"),
        lambda: history.forget_dropped(session.id),
        lambda: history.remove(session.id),
        lambda: history.set_setting("model", "b"),
    ]
    for change in changes:
        with pytest.raises(SessionError) as caught:
            change()
        assert "writable" in caught.value.hint
    assert history.load(session.id) == before and history.setting("model") == "a"
    history.close()


def test_a_file_taken_away_while_running_is_noticed(folder: Path) -> None:
    history = History.open(folder)
    session = begin(history)
    say(history, session)
    (folder / "sessions.db").rename(folder / "moved.db")
    with pytest.raises(SessionError) as caught:
        say(history, session)
    assert "/export" in caught.value.hint
    history.close()
