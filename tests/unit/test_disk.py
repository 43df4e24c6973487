"""Files that are written whole or not at all, and locks: one holder at a time, also when a holder is killed or removes
its file."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from koala_local.disk import PRIVATE, lock, nearest, remove_leftovers, replacing, try_lock, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(work: Callable[[], None]) -> None:
    """Do `work` in a child that ends without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def half_written(path: Path) -> None:
    """What a process leaves that is killed while it writes the file."""

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half of a long text")
            os._exit(0)

    killed(write)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, [b"new ", b"text"])
    assert path.read_bytes() == b"new text" and names(tmp_path) == ["x"]
    write_whole(path, [], mode=PRIVATE)
    assert path.read_bytes() == b"" and path.stat().st_mode & 0o777 == PRIVATE


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(errno.ENOSPC, "full")])
def test_what_fails_on_the_way_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def parts() -> Iterator[bytes]:
        yield b"half"
        assert path.read_bytes() == b"old"
        raise error

    with pytest.raises(type(error)):
        write_whole(path, parts())
    assert path.read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_what_a_killed_writer_left_is_written_over_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x"
    half_written(path)
    assert names(tmp_path) == [".x.lock", ".x.partial"]
    with replacing(path) as temporary:
        assert temporary.read_bytes() == b""
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and names(tmp_path) == ["x"]


def test_leftovers_of_killed_writers_are_removed_those_of_living_ones_not(tmp_path: Path) -> None:
    half_written(tmp_path / "x")
    (tmp_path / "mine.partial").touch()
    with replacing(tmp_path / "y") as temporary:
        temporary.write_bytes(b"whole")
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [".y.lock", ".y.partial", "mine.partial"]
    assert names(tmp_path) == ["mine.partial", "y"]


def test_two_writers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as temporary:
        temporary.write_bytes(b"first")
        with pytest.raises(BlockingIOError, match="another program"), replacing(path, seconds=0.1):
            pytest.fail("two have it")
    with replacing(path) as temporary:
        temporary.write_bytes(b"second")
    assert path.read_bytes() == b"second"


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / ".x.partial").symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "x", [b"new"])
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert names(tmp_path) == ["precious", "x"] and not (tmp_path / "x").is_symlink()


def test_a_library_that_replaces_the_file_itself_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as temporary:
        (tmp_path / "own").write_bytes(b"whole")
        (tmp_path / "own").replace(temporary)
        remove_leftovers(tmp_path)
        assert temporary.exists()
    assert path.read_bytes() == b"whole" and names(tmp_path) == ["x"]


def test_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest(tmp_path) == nearest(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest(Path("a", "b")) == tmp_path


# -- locks


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first = try_lock(path, PRIVATE)
    assert first is not None and try_lock(path) is None
    assert path.stat().st_mode & 0o777 == PRIVATE
    os.close(first)
    second = try_lock(path)
    assert second is not None
    os.close(second)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    killed(lambda: os._exit(try_lock(tmp_path / "x.lock") or 0))
    with lock(tmp_path / "x.lock") as alone:
        assert alone


def test_a_file_removed_between_opening_and_locking_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "x.lock", os.open
    removals = [True, True]

    def removed_after_opening(name: Path, flags: int, mode: int) -> int:
        descriptor = opened(name, flags, mode)
        if removals:
            removals.pop()
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", removed_after_opening)
    held = try_lock(path)
    assert held is not None and path.exists() and try_lock(path) is None
    os.close(held)


def test_waiting_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    start = time.monotonic()
    with lock(path) as alone, lock(path, 0.1) as second:
        assert alone and not second
        assert 0.1 <= time.monotonic() - start < 5
    with lock(path, 5) as alone:
        assert alone and try_lock(path) is None
    assert time.monotonic() - start < 5
