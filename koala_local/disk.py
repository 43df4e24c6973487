"""What is written reaches the disk, under its name there is all of it or none, and one process at a time writes it.

A lock is flock's, on a file: it ends with the process that holds it, also by `kill -9`. What is written is not itself
locked, since some network file systems then refuse to write it. A file system without locks grants every one: there
two programs that write one file at once may spoil it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # what a disk, a limit or a quota that is full answers
PRIVATE = 0o600  # the mode of a file for its owner's eyes
_POLL_S, _LONGEST_POLL_S = 0.02, 1.0  # between looks at a lock: twice as long each time


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(path: Path) -> Path:
    """The path, or the first folder above it that is there: where its space will be taken."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), path)


def write_whole(path: Path, parts: Iterable[bytes], *, mode: int = 0o666) -> None:
    """Write the file as `replacing` does. Raises OSError, and what making the parts raises."""
    with replacing(path, mode=mode) as temporary, temporary.open("wb") as file:
        file.writelines(parts)


@contextmanager
def replacing(path: Path, *, seconds: float = 5.0, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside `path` to write to. When the block ends it is flushed and takes the name `path`, under which
    there is the whole of it or what was there before; when the block raises it is removed.

    It is called `.NAME.partial`, and `.NAME.lock` is locked meanwhile. What a process that was killed left is written
    over by the next one, or goes with `remove_leftovers`. Raises OSError: BlockingIOError where another process still
    writes it after `seconds`."""
    temporary = path.with_name(f".{path.name}.partial")
    with lock(_guard(temporary), seconds, mode) as alone:
        if not alone:
            raise BlockingIOError(errno.EWOULDBLOCK, "another program is writing it", str(path))
        try:
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            _remove(temporary)
    with suppress(OSError):  # not every file system flushes a folder
        sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed left of `replacing` in the folder. What cannot be deleted stays."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError), lock(_guard(path)) as dead:
            if dead:
                _remove(path)


def _guard(temporary: Path) -> Path:
    return temporary.with_suffix(".lock")


def _remove(temporary: Path) -> None:
    """Away with it and with its lock, which must be held: so the names can be nobody else's."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        _guard(temporary).unlink(missing_ok=True)


@contextmanager
def lock(path: Path, seconds: float = 0.0, mode: int = 0o666, *, removed: bool = False) -> Iterator[bool]:
    """Lock the file `path`, as `try_lock` does, until the block ends; then it may be `removed`. Yields whether it is
    locked: not where somebody else still held it after `seconds`. Raises OSError when the file cannot be made."""
    deadline, pause = time.monotonic() + seconds, _POLL_S
    while (descriptor := try_lock(path, mode)) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_S)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if removed:
                with suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def try_lock(path: Path, mode: int = 0o666) -> int | None:
    """Lock the file `path`, made if need be, and return its descriptor: closing that unlocks it. None while another
    process, or another call in this one, holds it. Who holds it may remove the file or give it another name: whoever
    comes then locks a new one. Raises OSError when the file cannot be made."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            if not _flock(descriptor):
                os.close(descriptor)
                return None
            if _same_file(descriptor, path):
                return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it after it was opened here: take the new one


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
