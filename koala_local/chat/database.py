"""The SQLite file of the saved sessions: opened in whatever state it is, or a good reason why it is not.

`open_database` never raises. A damaged file is set aside under a new name, with its write-ahead log, and a fresh one
begun: nothing is deleted. A folder that cannot be written, or a full disk: the database is opened only to be read. One
that cannot be read either, or is of a newer version: a database is held in memory, and the file is left as it is.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from koala_local.disk import PRIVATE, lock
from koala_local.engine.text_stream import one_line
from koala_local.paths import private_folder

NAME = "sessions.db"
VERSION = 1  # PRAGMA user_version
_APPLICATION = 0x6B6F616C  # PRAGMA application_id: "koal"
_BUSY_SECONDS = 5.0
_SMALLEST_PAGE = 512  # bytes; no database of SQLite's is shorter, but for empty ones

# A node's parent and a session's head are always nodes of the same session: the database itself sees to it. There is no
# ON DELETE CASCADE from parent to child, since SQLite would recurse once per turn. AUTOINCREMENT: ids are never reused,
# and a parent's id is always smaller than its child's.
_SCHEMA = """
CREATE TABLE session (
    id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    system TEXT NOT NULL,
    format TEXT NOT NULL,
    model TEXT NOT NULL,
    seed INTEGER NOT NULL,
    head INTEGER,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    FOREIGN KEY (id, head) REFERENCES node (session, id) DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE node (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    session TEXT NOT NULL REFERENCES session (id) DEFERRABLE INITIALLY DEFERRED,
    parent INTEGER,
    user TEXT NOT NULL,
    reply TEXT NOT NULL,
    finish TEXT NOT NULL,
    reply_ids BLOB NOT NULL,
    vocabulary TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    dropped INTEGER NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,
    UNIQUE (session, id),
    FOREIGN KEY (session, parent) REFERENCES node (session, id) DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_STATEMENTS = [statement.strip() for statement in _SCHEMA.split(";\n") if statement.strip()]
_DAMAGED_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Opened(NamedTuple):
    """A connection in autocommit mode. `path` is None when it is in memory; `warning` is empty or one line, and says so
    where nothing can be saved."""

    connection: sqlite3.Connection
    path: Path | None
    warning: str


class _Damaged(Exception):
    """The file is no database of this program, or its pages are not sound."""


class _TooNew(Exception):
    """The file is sound, and only a newer program knows what it means."""


_FAILURES = (_Damaged, _TooNew, OSError, sqlite3.Error, ValueError, MemoryError)


def open_database(folder: Path) -> Opened:
    """The database in `folder`, checked and ready; never raises."""
    file = folder / NAME
    try:
        private_folder(folder)
        # Two programs must not both set it aside; one that is stopped must not stop this one, which goes on unlocked.
        with lock(folder / "sessions.lock", _BUSY_SECONDS, PRIVATE):
            return _open_or_begin_anew(file)
    except _FAILURES as error:
        reason = _reason(file, error)
    saved = None
    try:
        saved = _open_to_read(file)
    except _FAILURES as error:
        if (unread := _reason(file, error)) != reason:
            reason = f"{reason}; nor can the saved ones be read: {unread}"
    warning = one_line(f"conversations will not be saved: {reason}", 1000)
    return Opened(saved, file, warning) if saved else Opened(_in_memory(), None, warning)


def _reason(file: Path, error: BaseException) -> str:
    if isinstance(error, _TooNew):
        return f"{file} {error}; it was left as it is"
    if isinstance(error, OSError):
        return f"{error.filename or file}: {error.strerror or error}"
    return f"{file}: {error}"


def error_code(error: BaseException) -> int:
    """SQLite's primary result code of an error, 0 where there is none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def is_damage(error: BaseException) -> bool:
    """Whether an error means that the file itself is damaged."""
    return error_code(error) in _DAMAGED_CODES


def _open_or_begin_anew(file: Path) -> Opened:
    try:
        return Opened(_open(file), file, "")
    except _Damaged as error:
        aside = _set_aside(file)
        warning = f"the saved sessions in {file} could not be read ({error}); they were set aside as {aside.name}"
        try:
            return Opened(_open(file), file, one_line(warning, 1000))
        except (OSError, sqlite3.Error, _Damaged) as again:
            raise _Damaged(f"{warning}, but no new file could be begun: {again}") from again


def _open(file: Path) -> sqlite3.Connection:
    """Raises _Damaged, _TooNew, OSError or sqlite3.Error."""
    _begin(file)
    connection = _connect(os.fspath(file))
    try:
        _refuse_foreign(connection)
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = FULL")  # a finished turn also survives a power cut
        _prepare(connection)
        _check_length(connection, file)
    except UnicodeDecodeError as error:  # in Python's making of an error that quotes from the file
        connection.close()
        raise _Damaged("its schema is malformed") from error
    except sqlite3.DatabaseError as error:
        connection.close()
        if is_damage(error) or error_code(error) == sqlite3.SQLITE_ERROR:  # the statements are right: it is the file
            raise _Damaged(str(error)) from error
        raise
    except BaseException:
        connection.close()
        raise
    return connection


def _open_to_read(file: Path) -> sqlite3.Connection | None:
    """A connection that cannot write and makes no file; None where nothing was saved. Raises as `_open` does."""
    if not os.path.isfile(file):
        return None
    _refuse_fragment(file, file.stat().st_size)
    # Who has the database open has made both files. Without them SQLite, which may not make them here, reads it only as
    # `immutable`, and then passes over the log: a database without the log that belongs to it may be half of one.
    shared = all(os.path.exists(f"{file}{suffix}") for suffix in ("-wal", "-shm"))
    if not shared and _log_size(file):
        raise _Damaged("its write-ahead log can be read only where the folder can be written")
    connection = _connect(f"{file.absolute().as_uri()}?mode=ro{'' if shared else '&immutable=1'}", uri=True)
    try:
        _refuse_foreign(connection)
        if not _is_empty(connection):
            _check(connection)
            _check_length(connection, file)
            return connection
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None


def _begin(file: Path) -> None:
    """Make the file with mode 0600 if it is missing. An existing one is not opened here: closing any descriptor of it
    would drop the locks of another connection in this process."""
    fresh = not os.path.lexists(file)
    size = 0 if fresh else file.stat().st_size
    if file.is_dir():
        raise _Damaged("it is a folder")
    _refuse_fragment(file, size)
    if fresh:
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    elif not os.access(file, os.W_OK):
        raise PermissionError(errno.EACCES, "the file cannot be written", os.fspath(file))
    elif file.stat().st_mode & 0o077:
        with suppress(OSError):
            file.chmod(0o600)


def _refuse_fragment(file: Path, size: int) -> None:
    if size == 0 and _log_size(file):
        raise _Damaged("the file is empty, its write-ahead log is not")  # SQLite would delete the log
    if 0 < size < _SMALLEST_PAGE:
        raise _Damaged("the file is too short")  # SQLite would take some of these for empty ones


def _log_size(file: Path) -> int:
    """Bytes in the write-ahead log, 0 when there is none."""
    with suppress(FileNotFoundError):
        return os.stat(f"{file}-wal").st_size
    return 0


def _in_memory() -> sqlite3.Connection:
    connection = _connect(":memory:")
    _prepare(connection)
    return connection


def _connect(target: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(target, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # one damaged letter must not hide a session
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty database; else check version, tables and pages. About 1 ms for each MiB."""
    connection.execute("BEGIN IMMEDIATE")  # also finds out whether the file can be written
    try:
        if _is_empty(connection):
            _create(connection)
        else:
            _check(connection)
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _is_empty(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return tables == 0 and _pragma(connection, "user_version") == 0


def _create(connection: sqlite3.Connection) -> None:
    for statement in _STATEMENTS:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")


def _check(connection: sqlite3.Connection) -> None:
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise _Damaged(problem)
    tables = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")}
    if _pragma(connection, "user_version") != VERSION or not tables.issuperset(_STATEMENTS):
        raise _Damaged("its tables are not as this program makes them")


def _check_length(connection: sqlite3.Connection, file: Path) -> None:
    """SQLite reads a last page that is cut short as if it ended in zeros. A log, if there is one, may complete it."""
    if not _log_size(file) and file.stat().st_size % _pragma(connection, "page_size"):
        raise _Damaged("the file is cut short")


def _refuse_foreign(connection: sqlite3.Connection) -> None:
    """What is not ours, or newer, must not even have its journal mode changed."""
    if _is_empty(connection):
        return
    if _pragma(connection, "application_id") != _APPLICATION:
        raise _Damaged("it is not a file of this program")
    version = _pragma(connection, "user_version")
    if version > VERSION:
        raise _TooNew(f"was written by a newer version of this program (format {version}, known is {VERSION})")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _set_aside(file: Path) -> Path:
    """Rename the database and its log to a free name beside it, and return that. Raises OSError."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (file.with_name(f"{file.stem}-damaged-{stamp}{f'-{number}' if number else ''}.db") for number in count())
    aside = next(path for path in names if not any(os.path.lexists(f"{path}{suffix}") for suffix in ("", "-wal")))
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{file}{suffix}", f"{aside}{suffix}")
    return aside
