"""The lock of a saved session: one program at a time talks in it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from koala_local.disk import PRIVATE, try_lock
from koala_local.paths import private_folder, session_file


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
        descriptor = try_lock(path, PRIVATE)
    except (OSError, ValueError):
        return SessionLock(path, None)
    return None if descriptor is None else SessionLock(path, descriptor)
