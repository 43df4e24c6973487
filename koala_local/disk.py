"""What has been written reaches the disk, and is written by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write the file; under its name there is the whole of it or what was there before. Raises OSError, and what making
    the parts raises."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the file `path`, which is made, until the block or this process ends, also by `kill -9`. Yields whether it
    is held: False where another process holds it and `wait` is not set. A file system that knows no locks grants all.
    Raises OSError when the file cannot be made."""
    import fcntl

    held = True
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            pass
        yield held
