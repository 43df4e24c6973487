"""The file of the saved conversations: no state of it, its folder or the disk gives a traceback or stops a chat."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from koala_local.chat.history import History
from koala_local.errors import SessionError
from tests.unit.chat.turns import REPOSITORY, begin, filled, say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


# -- a file that cannot be used


def still_chats(folder: Path) -> History:
    """Open, list and load everything, add a turn: nothing but SessionError may come out."""
    history = History.open(folder)
    try:
        for summary in history.sessions():
            try:
                history.load(summary.id)
            except SessionError as error:
                assert error.message
        history.latest()
        history.setting("model")
    except SessionError as error:
        assert error.message and error.hint
    try:
        say(history, begin(history))
    except SessionError as error:
        assert error.message and error.hint
    history.close()
    return history


def root_page(file: Path, table: str) -> tuple[int, int]:
    """(offset, page size)"""
    connection = sqlite3.connect(file)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    return (page - 1) * size, size


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        handle.write(data)


def test_damage_sets_the_file_aside_whole(folder: Path) -> None:
    noise = random.Random(1).randbytes
    text = b"Dear diary, this is no database. "
    for number, damaged in enumerate([noise(1), noise(50), noise(100_000), text, text * 1000]):
        place = folder / str(number)
        place.mkdir(parents=True)
        (place / "sessions.db").write_bytes(damaged)
        history = still_chats(place)
        (aside,) = place.glob("sessions-damaged-*.db")
        assert aside.read_bytes() == damaged
        assert aside.name in history.warning and str(history.path) in history.warning and "\n" not in history.warning
        again = History.open(place)
        assert again.warning == "" and len(again.sessions()) == 1
        again.close()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_set_aside(folder: Path, keep: float) -> None:
    file = filled(folder)
    os.truncate(file, int(file.stat().st_size * keep))
    content = file.read_bytes()
    assert still_chats(folder).warning
    (aside,) = folder.glob("sessions-damaged-*.db")
    assert aside.read_bytes() == content


@pytest.mark.parametrize("table", ["session", "node", "setting", "sqlite_autoindex_node_1"])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x5A])
def test_a_flipped_root_page_is_set_aside(folder: Path, table: str, byte: int) -> None:
    file = filled(folder)
    offset, size = root_page(file, table)
    overwrite(file, offset, bytes([byte]) * size)
    history = still_chats(folder)
    assert "set aside" in history.warning and history.path == file
    assert len(list(folder.glob("sessions-damaged-*.db"))) == 1


def test_damage_while_running_is_an_error_and_set_aside_at_the_next_start(folder: Path) -> None:
    file = filled(folder)
    history = History.open(folder)
    (session,) = history.sessions()
    offset, size = root_page(file, "node")
    overwrite(file, offset, b"\xff" * size)
    history._connection.execute("PRAGMA shrink_memory")  # forget the pages read so far
    for read in (history.sessions, history.latest, lambda: history.load(session.id)):
        with pytest.raises(SessionError) as caught:
            read()
        assert "start koala again" in caught.value.hint
    with pytest.raises(SessionError):
        say(history, begin(history))
    history.close()
    assert "set aside" in still_chats(folder).warning


def test_a_folder_at_that_name_is_set_aside(folder: Path) -> None:
    (folder / "sessions.db" / "inner").mkdir(parents=True)
    assert "set aside" in still_chats(folder).warning
    (aside,) = folder.glob("sessions-damaged-*.db")
    assert (aside / "inner").is_dir() and (folder / "sessions.db").is_file()


def test_an_empty_file_is_a_fresh_start(folder: Path) -> None:
    folder.mkdir()
    (folder / "sessions.db").touch()
    assert still_chats(folder).warning == ""


@pytest.mark.parametrize("remove", [True, False])
def test_the_log_of_an_emptied_file_is_kept(folder: Path, tmp_path: Path, remove: bool) -> None:
    history = History.open(folder)
    say(history, begin(history))
    shutil.copytree(folder, tmp_path / "copy")  # as a crash would leave it: the turns are in the log
    history.close()
    file, log = tmp_path / "copy" / "sessions.db", tmp_path / "copy" / "sessions.db-wal"
    content = log.read_bytes()
    assert content
    if remove:
        file.unlink()
    else:
        os.truncate(file, 0)
    assert "set aside" in still_chats(tmp_path / "copy").warning
    (aside,) = (tmp_path / "copy").glob("sessions-damaged-*.db-wal")
    assert aside.read_bytes() == content


def test_another_programs_database_is_set_aside_untouched(folder: Path) -> None:
    folder.mkdir()
    foreign = sqlite3.connect(folder / "sessions.db")
    foreign.execute("CREATE TABLE session (id TEXT, cookie TEXT)")
    foreign.commit()
    foreign.close()
    content = (folder / "sessions.db").read_bytes()
    assert "set aside" in still_chats(folder).warning
    (aside,) = folder.glob("sessions-damaged-*.db")
    assert aside.read_bytes() == content


def test_a_newer_version_is_left_alone(folder: Path) -> None:
    file = filled(folder)
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = file.read_bytes()
    history = still_chats(folder)
    assert history.path is None and "newer version" in history.warning and str(file) in history.warning
    assert file.read_bytes() == content and list(folder.glob("*damaged*")) == []


def test_two_damaged_files_in_a_second_do_not_meet(folder: Path) -> None:
    for _ in range(3):
        folder.mkdir(exist_ok=True)
        (folder / "sessions.db").write_bytes(b"nonsense" * 100)
        still_chats(folder)
    assert len(list(folder.glob("sessions-damaged-*.db"))) == 3


def test_programs_that_start_together_set_it_aside_once(folder: Path) -> None:
    folder.mkdir()
    (folder / "sessions.db").write_bytes(b"nonsense" * 100)
    code = (
        "import sys; from pathlib import Path; from koala_local.chat.history import History\n"
        "sys.stdin.readline(); history = History.open(Path(sys.argv[1]))\n"
        "s = history.create(model='', format='', system='', seed=0)\n"
        "history.add_turn(s.id, parent=None, user='', reply='', finish='', reply_ids=(), vocabulary='', attempt=0,"
        " dropped=0)\nassert history.path, history.warning"
    )
    command = [sys.executable, "-c", code, str(folder)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, cwd=REPOSITORY) for _ in range(5)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=30)
        assert child.returncode == 0
    assert len(list(folder.glob("sessions-damaged-*.db"))) == 1
    assert len(History.open(folder).sessions()) == 5


def test_no_flipped_byte_gives_a_traceback(folder: Path, tmp_path: Path) -> None:
    original = filled(folder, turns=6).read_bytes()
    dice = random.Random(7)
    for number in range(60):
        place = tmp_path / f"mutant{number}"
        place.mkdir()
        mutant = bytearray(original)
        for _ in range(dice.choice((1, 3, 20))):
            mutant[dice.randrange(dice.choice((100, 4096, len(mutant))))] = dice.randrange(256)
        (place / "sessions.db").write_bytes(mutant)
        still_chats(place)


# -- a disk that cannot be used


def as_ordinary_user() -> None:
    """Without root's power to write anywhere, where the tests run as root: takes effect with the next exec."""
    drop_from_bounding_set, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


CHILD = """
import json, sys
from pathlib import Path
from koala_local.chat.history import History
from koala_local.errors import SessionError
history = History.open(Path(sys.argv[1]))
saved = len(history.sessions())
session = history.create(model="m", format="f", system="", seed=1)
try:
    node = history.add_turn(session.id, parent=None, user="u", reply="r", finish="stop", reply_ids=(1,), vocabulary="v",
                            attempt=0, dropped=0)
    assert history.load(session.id)[1] == [node]
except SessionError as error:
    assert history.path and error.hint, error
print(json.dumps([history.warning, str(history.path), saved]))
"""


def in_child(folder: Path) -> tuple[str, str, int]:
    """(warning, path, saved sessions) of a history opened, and talked in, by a program without root's powers."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        preexec_fn=as_ordinary_user,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warning, path, saved = json.loads(done.stdout)
    return warning, path, saved


@pytest.mark.skipif(sys.platform != "linux", reason="modes as on Linux")
@pytest.mark.parametrize("what", ["missing", "folder", "file", "unreadable"])
def test_what_the_modes_forbid(folder: Path, what: str) -> None:
    if what == "missing":
        folder.parent.chmod(0o500)
    else:
        filled(folder)
        {"folder": folder, "file": folder / "sessions.db", "unreadable": folder / "sessions.db"}[what].chmod(
            {"folder": 0o500, "file": 0o400, "unreadable": 0}[what]
        )
    try:
        warning, path, saved = in_child(folder)
    finally:
        folder.parent.chmod(0o700)
    read = what in ("folder", "file")
    assert (path, saved) == ((str(folder / "sessions.db"), 1) if read else ("None", 0))
    assert "not be saved" in warning and str(folder) in warning and "\n" not in warning
    assert ("nor can the saved ones be read" in warning) == (what == "unreadable")
    assert {path.name for path in folder.glob("*")} <= {"sessions.db", "sessions.lock"}


def forbid_writing(folder: Path) -> None:
    """Also for root: what is to be locked before anything is written cannot be."""
    (folder / "sessions.lock").unlink(missing_ok=True)
    (folder / "sessions.lock").mkdir()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["data", "my data?mode=rw#50%25 é"])
def test_what_cannot_be_written_is_still_read(tmp_path: Path, name: str) -> None:
    file = filled(tmp_path / name, turns=3)
    forbid_writing(file.parent)
    before = contents(file.parent)
    history = History.open(file.parent)
    assert history.path == file and "not be saved" in history.warning and "\n" not in history.warning
    (summary,) = history.sessions()
    assert summary.turns == 3 and len(history.load(summary.id)[1]) == 3
    with pytest.raises(SessionError) as caught:
        say(history, begin(history))
    assert "writable" in caught.value.hint
    history.close()
    assert contents(file.parent) == before


@pytest.mark.parametrize(
    ("left", "read"),
    [
        (("-wal", "-shm"), True),  # as after a crash
        (("-wal",), False),
        (("-shm",), None),  # the turns were in the log
    ],
)
def test_a_log_that_was_left_is_read_or_said_to_be_unread(
    folder: Path, tmp_path: Path, left: tuple[str, ...], read: bool | None
) -> None:
    history = History.open(folder)
    say(history, begin(history))
    copy = tmp_path / "copy"
    copy.mkdir()
    for suffix in ("", *left):
        shutil.copy(folder / f"sessions.db{suffix}", copy)
    history.close()
    forbid_writing(copy)
    before = contents(copy)
    history = History.open(copy)
    assert "not be saved" in history.warning and len(history.sessions()) == bool(read)
    assert (history.path is not None) == bool(read) and ("write-ahead log" in history.warning) == (read is False)
    history.close()
    after = contents(copy)
    assert after.keys() == before.keys() and all(after[name] == before[name] for name in before if "shm" not in name)


def test_an_empty_log_hides_nothing(folder: Path) -> None:
    filled(folder)
    (folder / "sessions.db-wal").touch()
    forbid_writing(folder)
    history = History.open(folder)
    assert len(history.sessions()) == 1
    history.close()


@pytest.mark.parametrize("content", [None, b"", b"short", b"nonsense" * 100])
def test_what_cannot_be_read_either_is_in_memory(folder: Path, content: bytes | None) -> None:
    folder.mkdir()
    forbid_writing(folder)
    if content is not None:
        (folder / "sessions.db").write_bytes(content)
    before = contents(folder)
    history = still_chats(folder)
    assert history.path is None and "not be saved" in history.warning
    assert ("nor can the saved ones be read" in history.warning) == bool(content)
    assert contents(folder) == before


def test_a_newer_version_is_not_read_either(folder: Path) -> None:
    file = filled(folder)
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    forbid_writing(folder)
    history = still_chats(folder)
    assert history.path is None and "not be saved" in history.warning and "newer version" in history.warning


def test_the_turns_of_a_program_that_can_write_are_seen(folder: Path) -> None:
    writing = History.open(folder)
    first = begin(writing)
    say(writing, first)
    forbid_writing(folder)
    reading = History.open(folder)
    say(writing, begin(writing))
    assert len(reading.sessions()) == 2
    reading.close()
    say(writing, first)
    writing.close()


@pytest.mark.parametrize("place", ["file", "file/below", "\0", "x" * 5000, "/proc/nowhere"])
def test_an_impossible_folder_means_in_memory(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    history = History.open(tmp_path / place)
    assert history.path is None and history.warning
    session = begin(history)
    node = say(history, session)
    assert history.load(session.id)[1] == [node]
    assert history.lock(session.id) is not None
    history.close()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from koala_local.chat.history import History
from koala_local.errors import SessionError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
def say(parent, size): return history.add_turn(session.id, parent=parent, user="u" * size, reply="r", finish="stop",
    reply_ids=(1,), vocabulary="v", attempt=0, dropped=0)
if sys.argv[2] == "at the start":
    limit(4096)
history = History.open(Path(sys.argv[1]))
session = history.create(model="m", format="f", system="", seed=1)
if sys.argv[2] == "at the start":
    node = say(None, 10)
    assert history.path is None and "not be saved" in history.warning, history.warning
    assert history.load(session.id)[1] == [node]
else:
    kept = [say(None, 10)]
    limit(600_000)
    for failures in range(3):
        try:
            for _ in range(1000):
                kept.append(say(kept[-1].id, 2000))
            raise AssertionError("the limit does not work")
        except SessionError as error:
            assert error.hint, error
        assert history.load(session.id)[1] == kept
    limit(hard)
    kept.append(say(kept[-1].id, 2000))
    history.close()
    assert History.open(Path(sys.argv[1])).load(session.id)[1] == kept and len(kept) > 20
"""


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_disk_that_takes_no_more(folder: Path, when: str) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(folder), when]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    history = History.open(folder)
    assert history.path is not None and history.warning == ""
    history.close()


TMPFS = """
import errno, subprocess, sys
from pathlib import Path
place = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
    sys.exit(77)
from koala_local.chat.history import History
from koala_local.errors import SessionError
history = History.open(place / "data")
session = history.create(model="m", format="f", system="", seed=1)
def say(parent): return history.add_turn(session.id, parent=parent, user="u" * 2000, reply="r", finish="stop",
    reply_ids=(1,), vocabulary="v", attempt=0, dropped=0)
kept = [say(None)]
try:
    for _ in range(1000):
        kept.append(say(kept[-1].id))
    raise AssertionError("the disk is not full")
except SessionError as error:
    assert "space" in error.hint or "full" in error.hint, error.hint
assert history.load(session.id)[1] == kept and len(kept) > 20
history.close()
(place / "filler").write_bytes(b"")
try:
    with (place / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 1024)
except OSError as error:
    assert error.errno == errno.ENOSPC
again = History.open(place / "data")
fresh = again.create(model="m", format="f", system="", seed=1)
try:
    again.add_turn(fresh.id, parent=None, user="u" * 9000, reply="r", finish="", reply_ids=(), vocabulary="", attempt=0,
                   dropped=0)
except SessionError as error:
    assert error.hint
again.close()
(place / "filler").unlink()
assert History.open(place / "data").load(session.id)[1] == kept
other = History.open(place / "data2")
assert other.path is not None or "not be saved" in other.warning
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    command = ["unshare", "--mount", sys.executable, "-c", TMPFS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("may not mount")
    assert done.returncode == 0, done.stderr


READ_ONLY = """
import subprocess, sys
from pathlib import Path
place = Path(sys.argv[1])
def mount(*options): return subprocess.run(["mount", *options, str(place)], capture_output=True).returncode
if mount("-t", "tmpfs", "tmpfs"):
    sys.exit(77)
from koala_local.chat.history import History
from koala_local.errors import SessionError
def say(session, parent): return history.add_turn(session.id, parent=parent, user="u", reply="r", finish="stop",
    reply_ids=(1,), vocabulary="v", attempt=0, dropped=0)
history = History.open(place / "data")
session = history.create(model="m", format="f", system="", seed=1)
kept = [say(session, None)]
left = {path.name: path.read_bytes() for path in (place / "data").iterdir() if path.is_file()}
history.close()
if sys.argv[2] == "crashed":
    for name, content in left.items():
        (place / "data" / name).write_bytes(content)
if mount("-o", "remount,ro"):
    sys.exit(77)
history = History.open(place / "data")
assert history.path and "not be saved" in history.warning, history.warning
assert history.latest().id == session.id and history.load(session.id)[1] == kept
for target in (session, history.create(model="m", format="f", system="", seed=1)):
    try:
        say(target, None)
        raise AssertionError("it was written")
    except SessionError as error:
        assert "writable" in error.hint, error.hint
history.close()
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a disk")
@pytest.mark.parametrize("left", ["closed", "crashed"])
def test_a_disk_that_is_really_read_only(tmp_path: Path, left: str) -> None:
    command = ["unshare", "--mount", sys.executable, "-c", READ_ONLY, str(tmp_path), left]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("may not mount")
    assert done.returncode == 0, done.stderr
