"""Saved KV caches: nothing is loaded but what was saved whole, for this very model and these settings."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from koala_local.chat.kv_files import CacheMiss, KvFiles
from koala_local.engine.base import Engine
from koala_local.errors import SessionError

KEY = "model=abc context=4096 kv=f16 flash=-1"


class FakeEngine:
    """Writes the ids and a payload that follows from them; dies on a file it did not write, as llama.cpp does."""

    def __init__(self, cache_key: str = KEY, vocabulary: str = "v", payload: int = 2000) -> None:
        self.cache_key, self.payload = cache_key, payload
        self.vocabulary = SimpleNamespace(key=vocabulary)
        self.slots: dict[int, list[int]] = {}
        self.loads = 0

    def content(self, ids: Sequence[int]) -> bytes:
        return struct.pack(f"<I{len(ids)}I", len(ids), *ids) + random.Random(sum(ids)).randbytes(self.payload)

    def save(self, slot: int, ids: Sequence[int], path: Path) -> None:
        with path.open("wb") as file:
            file.write(self.content(ids))

    def load(self, slot: int, path: Path) -> list[int]:
        self.loads += 1
        content = path.read_bytes()
        (count,) = struct.unpack_from("<I", content)
        ids = list(struct.unpack_from(f"<{count}I", content, 4))
        assert content == self.content(ids), "a damaged file reached the engine"
        self.slots[slot] = ids
        return ids

    def crop(self, slot: int, length: int) -> int:
        self.slots[slot] = self.slots.get(slot, [])[:length]
        return len(self.slots[slot])


def fake(cache_key: str = KEY, vocabulary: str = "v", payload: int = 2000) -> tuple[Engine, FakeEngine]:
    engine = FakeEngine(cache_key, vocabulary, payload)
    return cast(Engine, engine), engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "kv"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def miss(files: KvFiles, engine: Engine, session: str = "aaaa2222") -> str:
    with pytest.raises(CacheMiss) as caught:
        files.restore(session, engine, 0)
    return str(caught.value)


# -- saving and restoring


def test_a_cache_comes_back(folder: Path) -> None:
    engine, state = fake()
    files = KvFiles(folder)
    files.save("aaaa2222", engine, 1, [1, 2, 3])
    files.save("bbbb2222", engine, 0, range(500))
    assert KvFiles(folder).restore("aaaa2222", engine, 3) == [1, 2, 3] == state.slots[3]
    assert files.restore("bbbb2222", engine, 0) == list(range(500))
    files.save("aaaa2222", engine, 1, [1, 2, 3, 4])
    saved = files.check("aaaa2222", engine)
    assert saved.ids == (1, 2, 3, 4) and saved.path == folder / "aaaa2222.kv"
    assert names(folder) == ["aaaa2222.json", "aaaa2222.kv", "bbbb2222.json", "bbbb2222.kv"]


def test_only_the_owner_may_look(folder: Path) -> None:
    before = os.umask(0)
    try:
        KvFiles(folder).save("aaaa2222", fake()[0], 0, [1])
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600, 0o600]
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700


def test_the_record_says_what_is_saved(folder: Path) -> None:
    KvFiles(folder).save("aaaa2222", fake()[0], 0, [7, 8])
    record = json.loads((folder / "aaaa2222.json").read_text().splitlines()[0])
    assert record["ids"] == [7, 8] and record["cache_key"] == KEY and record["vocabulary"] == "v"
    assert record["length"] == (folder / "aaaa2222.kv").stat().st_size and len(record["sha256"]) == 64
    assert abs(time.mktime(time.strptime(record["saved"], "%Y-%m-%dT%H:%M:%SZ")) - time.mktime(time.gmtime())) < 60


def test_looking_makes_no_folder(folder: Path) -> None:
    files = KvFiles(folder)
    assert miss(files, fake()[0]) == "no KV cache was saved"
    files.prune()
    files.remove("aaaa2222")
    assert not folder.exists()


def test_remove(folder: Path) -> None:
    files, (engine, _) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1])
    files.remove("aaaa2222")
    assert names(folder) == [] and miss(files, engine) == "no KV cache was saved"


@pytest.mark.parametrize("name", ["../aaaa", "", "/etc/x", "a/b", "a\0"])
def test_no_session_id_leads_out_of_the_folder(folder: Path, name: str) -> None:
    files, (engine, _) = KvFiles(folder), fake()
    calls: list[Callable[[], object]] = [
        lambda: files.save(name, engine, 0, [1]),
        lambda: files.restore(name, engine, 0),
        lambda: files.remove(name),
    ]
    for call in calls:
        with pytest.raises(SessionError):
            call()


# -- what is refused, and why


@pytest.mark.parametrize(
    ("cache_key", "vocabulary", "reason"),
    [
        ("model=new context=4096 kv=f16 flash=-1", "v", "the model file changed"),
        ("model=new context=2048 kv=f16 flash=-1", "v", "the model file changed"),
        ("model=abc context=2048 kv=f16 flash=-1", "v", "the context is 2048 now, was 4096"),
        ("model=abc context=4096 kv=q8_0 flash=-1", "v", "the KV type is q8_0 now, was f16"),
        ("model=abc context=4096 kv=f16 flash=1", "v", "the flash attention setting is 1 now, was -1"),
        ("something else", "v", "the model file changed"),
        (KEY, "w", "it was made with another model: the vocabulary differs"),
    ],
)
def test_another_model_or_setting_is_refused_with_the_reason(
    folder: Path, cache_key: str, vocabulary: str, reason: str
) -> None:
    files, (engine, _) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1, 2])
    other, other_state = fake(cache_key, vocabulary)
    assert miss(files, other) == reason
    assert other_state.loads == 0
    assert files.restore("aaaa2222", engine, 0) == [1, 2]  # it stays good for what it was saved with


def test_a_record_of_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    monkeypatch.setattr("koala_local.chat.kv_files._FORMAT", 1)
    files.save("aaaa2222", engine, 0, [1])
    monkeypatch.undo()
    assert "another version" in miss(files, engine) and state.loads == 0


def mutated(content: bytes, dice: random.Random) -> bytes:
    """One of: bytes changed, cut, lengthened, a part doubled or taken out."""
    at, kind = dice.randrange(len(content)), dice.randrange(5)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(dice.choice((1, 1, 4))):
            changed[dice.randrange(len(content))] ^= dice.randrange(1, 256)
        return bytes(changed)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content + dice.randbytes(dice.randrange(1, 50))
    part = content[at : at + dice.randrange(1, 9)]
    return content[:at] + part + content[at:] if kind == 3 else content[:at] + content[at + len(part) :]


def test_no_mutant_reaches_the_engine(folder: Path) -> None:
    files, (engine, state) = KvFiles(folder), fake(payload=300)
    dice = random.Random(200)
    files.save("aaaa2222", engine, 0, range(100))
    good = {name: (folder / name).read_bytes() for name in names(folder)}
    refused = 0
    while refused < 200:
        changed = dict(good)
        for name in dice.choice((["aaaa2222.kv"], ["aaaa2222.json"], list(good))):
            changed[name] = mutated(good[name], dice)
        if changed == good:
            continue
        for name, content in changed.items():
            (folder / name).write_bytes(content)
        assert miss(files, engine) == "the saved KV cache is damaged"
        assert names(folder) == []
        refused += 1
    assert state.loads == 0
    for name, content in good.items():
        (folder / name).write_bytes(content)
    assert files.restore("aaaa2222", engine, 0) == list(range(100))


@pytest.mark.parametrize(("name", "other"), [("aaaa2222.kv", "bbbb2222.kv"), ("aaaa2222.json", "bbbb2222.json")])
def test_halves_of_two_pairs_are_refused(folder: Path, name: str, other: str) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1, 2])
    files.save("bbbb2222", engine, 0, [3, 4])
    (folder / name).write_bytes((folder / other).read_bytes())
    assert miss(files, engine) == "the saved KV cache is damaged" and state.loads == 0


def test_a_missing_half_is_none(folder: Path) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    for name in ("aaaa2222.kv", "aaaa2222.json"):
        files.save("aaaa2222", engine, 0, [1, 2])
        (folder / name).unlink()
        assert miss(files, engine) == "no KV cache was saved"
        files.prune()
        assert len(names(folder)) == 1  # another program may just be saving it
        for half in folder.iterdir():
            os.utime(half, (0, 0))
        files.prune()
        assert names(folder) == []
    assert state.loads == 0


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1, 2])
    for suffix in (".kv", ".json"):
        (folder / f"aaaa2222{suffix}").unlink()
        (folder / f"aaaa2222{suffix}").mkdir()
        assert "cannot be read" in miss(files, engine)
    with pytest.raises(SessionError):
        files.save("aaaa2222", engine, 0, [1, 2])
    files.prune()
    assert state.loads == 0


def test_a_load_that_fails_leaves_the_slot_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1, 2])

    def half(slot: int, path: Path) -> list[int]:
        state.slots[slot] = [1]
        raise OSError("llama.cpp could not read it")

    monkeypatch.setattr(state, "load", half)
    assert "could not read it" in miss(files, engine) and state.slots[0] == []
    monkeypatch.setattr(state, "load", lambda slot, path: [9, 9])
    assert "another program" in miss(files, engine)


# -- the limit


def age(folder: Path, session: str, seconds: int) -> None:
    when = time.time() - seconds
    os.utime(folder / f"{session}.kv", (when, when))


def test_the_oldest_leave_first(folder: Path) -> None:
    files, (engine, _) = KvFiles(folder, limit_bytes=3000 * 3), fake(payload=2000)
    for number, session in enumerate(["cccc2222", "aaaa2222", "bbbb2222"]):
        files.save(session, engine, 0, [number])
        age(folder, session, 100 - number)
    files.save("dddd2222", engine, 0, [4])
    assert {name.split(".")[0] for name in names(folder)} == {"aaaa2222", "bbbb2222", "dddd2222"}
    age(folder, "dddd2222", 1000)
    files.save("dddd2222", engine, 0, [5])  # saved anew, it is the youngest
    age(folder, "bbbb2222", -1000)  # a clock that was wrong
    KvFiles(folder, limit_bytes=3000).save("dddd2222", engine, 0, [6])
    assert {name.split(".")[0] for name in names(folder)} == {"dddd2222"}


def test_what_alone_exceeds_the_limit_is_not_saved(folder: Path) -> None:
    files = KvFiles(folder, limit_bytes=3000)
    files.save("aaaa2222", fake()[0], 0, [1])
    files.save("bbbb2222", fake(payload=500)[0], 0, [2])
    before = names(folder)
    with pytest.raises(SessionError) as caught:
        files.save("bbbb2222", fake(payload=3000)[0], 0, [2])
    assert "GiB" in caught.value.message and caught.value.hint
    assert names(folder) == before and files.restore("bbbb2222", fake(payload=500)[0], 0) == [2]


# -- programs that die, disks that fail


def test_leftovers_of_dead_programs_are_removed_those_of_living_ones_not(folder: Path) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1])
    (folder / ".dddd2222.kv.partial").write_bytes(b"half")
    write = state.save
    seen: list[list[str]] = []

    def slow(slot: int, ids: Sequence[int], path: Path) -> None:
        assert not (folder / ".dddd2222.kv.partial").exists()  # gone before the disk is needed
        write(slot, ids, path)
        KvFiles(folder).prune()
        KvFiles(folder).save("cccc2222", fake()[0], 0, [3])
        seen.append([name for name in names(folder) if name.endswith(".partial")])

    state.save = slow  # type: ignore[method-assign]
    files.save("bbbb2222", engine, 0, [2])
    assert len(seen[0]) == 1 and "dddd2222" not in seen[0][0]
    assert {name.split(".")[0] for name in names(folder)} == {"aaaa2222", "bbbb2222", "cccc2222"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("function", ["engine", "fsync", "replace", "second replace", "open"])
def test_a_disk_that_fails_leaves_the_old_pair_or_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    files, (engine, state) = KvFiles(folder), fake()
    files.save("aaaa2222", engine, 0, [1])
    calls = iter([False, True]) if function == "second replace" else iter([True])
    name = function.removeprefix("second ")
    original: Callable[..., object] = state.save if name == "engine" else getattr(os, name)

    def failing(*arguments: object, **more: object) -> object:
        if next(calls, False):
            raise OSError(code, os.strerror(code))
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(state if name == "engine" else os, "save" if name == "engine" else name, failing)
        with pytest.raises(SessionError) as caught:
            files.save("aaaa2222", engine, 0, [1, 2])
    assert os.strerror(code) in caught.value.message and str(folder) in caught.value.message
    if "replace" in function:  # the old record had to leave first
        assert names(folder) == [] and miss(files, engine) == "no KV cache was saved"
    else:
        assert files.restore("aaaa2222", engine, 0) == [1]
    files.save("aaaa2222", engine, 0, [1, 2])
    assert files.restore("aaaa2222", engine, 0) == [1, 2]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files, (engine, _) = KvFiles(tmp_path / "file" / "kv"), fake()
    with pytest.raises(SessionError):
        files.save("aaaa2222", engine, 0, [1])
    assert "cannot be read" in miss(files, engine)
    files.prune()


def kill_at(files: KvFiles, engine: Engine, ids: list[int], step: int) -> bool:
    """Save in a forked child that dies with no clean-up before system call number `step`; True if it got through."""
    child = os.fork()
    if child == 0:
        done = 0

        def dying(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **more: object) -> object:
                nonlocal done
                done += 1
                if done > step:
                    os._exit(9)
                return original(*arguments, **more)

            return call

        for name in ("open", "fsync", "replace", "unlink", "close", "fstat"):
            setattr(os, name, dying(getattr(os, name)))
        files.save("aaaa2222", engine, 0, ids)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_death_at_any_step_leaves_the_old_the_new_or_none(folder: Path) -> None:
    files, (engine, _) = KvFiles(folder), fake()
    old, new, found = [1, 2], [3, 4, 5], set()
    for step in range(100):
        files.save("aaaa2222", engine, 0, old)
        through = kill_at(files, engine, new, step)
        try:
            found.add(tuple(files.restore("aaaa2222", engine, 0)))
        except CacheMiss as error:
            assert str(error) == "no KV cache was saved"
            found.add(())
        if through:
            break
    assert found == {tuple(old), tuple(new), ()} and step > 10
    files.save("aaaa2222", engine, 0, new)
    assert names(folder) == ["aaaa2222.json", "aaaa2222.kv"]


SAVER = """
import sys
from pathlib import Path
from tests.unit.chat.test_kv_files import KvFiles, fake
files, (engine, _) = KvFiles(Path(sys.argv[1])), fake(payload=300_000)
for number in range(100_000):
    files.save("aaaa2222", engine, 0, range(number % 700 + 1))
    print(number, flush=True)
"""


def test_kill_at_random_moments(folder: Path) -> None:
    dice, restored = random.Random(9), 0
    repository = Path(__file__).parents[3]
    for _ in range(30):
        if restored == 2:
            break
        command = [sys.executable, "-c", SAVER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repository) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(dice.uniform(0.0, 0.1))
            child.kill()
        try:
            ids = KvFiles(folder).restore("aaaa2222", fake(payload=300_000)[0], 0)
            assert ids == list(range(len(ids))) and ids
            restored += 1
        except CacheMiss as error:
            assert str(error) == "no KV cache was saved"
    KvFiles(folder).prune()
    assert [name for name in names(folder) if name.endswith(".partial")] == []
    assert restored
