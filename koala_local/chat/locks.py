"""Locks that end with the process that holds them, also by `kill -9`: flock on a file.

Where a file system has no locks every one is granted: a second program is then not noticed, and nothing else is lost.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from koala_local.paths import private_folder, session_file


def try_lock(path: Path) -> int | None:
    """Lock `path`, made with mode 0600 if need be, and return its descriptor: closing it unlocks. None while another
    program, or another call in this one, holds it. Raises OSError when the file cannot be made."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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


@contextmanager
def waiting_lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock on `path`; after `seconds` go on without it, since a stopped program must not stop this one."""
    deadline = time.monotonic() + seconds
    while (descriptor := try_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


class SessionLock:
    """Held by the one program that talks in a session, until it is released or the process ends."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        """`descriptor` as from `try_lock`, None for a lock that holds nothing."""
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Let go; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):  # while it is still locked: nobody can come to hold a file that is gone
                self._path.unlink()
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_session(folder: Path, session_id: str) -> SessionLock | None:
    """The lock of a session, below the data folder; None when another program holds it. Where nothing can be written
    nobody can tell, and it is granted. Raises SessionError for an id that is none."""
    path = session_file(folder / "locks", session_id, ".lock")
    try:
        private_folder(path.parent)
        descriptor = try_lock(path)
    except (OSError, ValueError):
        return SessionLock(path, None)
    return None if descriptor is None else SessionLock(path, descriptor)
