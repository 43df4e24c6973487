"""The saved conversations: each session is a tree of turns, in one SQLite file (see database.py for how it is opened).

Text is the truth; the token ids of a reply ride along under the key of the vocabulary in which they mean something.
Every write is one committed transaction, on disk when the method returns. A session is written with its first turn:
what was created, or given a system text, and never talked in leaves nothing behind.

A write that fails raises SessionError and changes nothing, here or on disk: the same call may be made again later.
Methods may be called from any thread.
"""

from __future__ import annotations

import base64
import difflib
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from koala_local.chat.database import error_code, is_damage, open_database
from koala_local.chat.locks import SessionLock, lock_session
from koala_local.chat.saved import (
    NODE_COLUMNS,
    SESSION_COLUMNS,
    Node,
    Session,
    SessionSummary,
    node_tree,
    pack_ids,
    session_of,
    sound_text,
    summary_of,
)
from koala_local.errors import SessionError

__all__ = ["History", "Node", "Session", "SessionLock", "SessionSummary"]

# Turns of the line that goes on: from the head up. Ids become smaller, also in a damaged file, so that it ends.
_LINE_LENGTH = """WITH RECURSIVE line (id, parent) AS (
    SELECT id, parent FROM node WHERE id = session.head
    UNION ALL SELECT node.id, node.parent FROM node JOIN line ON node.id = line.parent AND node.id < line.id
) SELECT count(*) FROM line"""


class History:
    """The saved sessions of one data folder. Make it with `History.open`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, path: Path | None, warning: str) -> None:
        self._folder = folder
        self.path = path  # None: in memory, nothing outlives the program
        self.warning = warning  # one line for the user, or ""
        self._connection = connection
        self._identity = _identity(path)
        self._mutex = threading.RLock()
        self._unwritten: dict[str, Session] = {}  # created here, without a turn yet

    @classmethod
    def open(cls, folder: Path) -> History:
        """The history in `folder`. Never raises: `warning` says what is wrong. Where the file can only be read, what
        writes raises SessionError; where it cannot be read either, `path` is None and all of it is in memory."""
        opened = open_database(folder)
        return cls(folder, opened.connection, opened.path, opened.warning)

    def close(self) -> None:
        """Close the file; nothing else may be called afterwards."""
        with self._mutex, suppress(sqlite3.Error):
            self._connection.close()

    def create(self, *, model: str, format: str, system: str, seed: int) -> Session:
        """A new session, written with its first turn. Its id has 40 random bits."""
        session_id = base64.b32encode(secrets.token_bytes(5)).decode().lower()
        now = time.time()
        session = Session(session_id, "", system, format, model, seed, None, now, now)
        self._unwritten[session_id] = session
        return session

    def add_turn(
        self,
        session_id: str,
        *,
        parent: int | None,
        user: str,
        reply: str,
        finish: str,
        reply_ids: Sequence[int],
        vocabulary: str,
        attempt: int,
        dropped: int,
        name: str = "",
        move_head: bool = True,
    ) -> Node:
        """Save a finished turn below `parent`; with `move_head` it becomes the session's head. Raises SessionError."""
        now, user, reply, name = time.time(), sound_text(user), sound_text(reply), sound_text(name)
        with self._transaction() as connection:
            self._ensure_written(connection, session_id)
            values = (
                session_id,
                parent,
                user,
                reply,
                finish,
                pack_ids(reply_ids),
                vocabulary,
                attempt,
                dropped,
                name,
                now,
            )
            columns = "session" + NODE_COLUMNS.removeprefix("id")
            node_id = _insert(connection, "node", columns, values)
            head, settings = (", head = ?", (node_id,)) if move_head else ("", ())
            connection.execute(f"UPDATE session SET updated = ?{head} WHERE id = ?", (now, *settings, session_id))
        self._unwritten.pop(session_id, None)
        return Node(node_id, parent, user, reply, finish, tuple(reply_ids), vocabulary, attempt, dropped, name, now)

    def set_head(self, session_id: str, node_id: int | None) -> None:
        """Go on from another node of the session; None is before its first turn. Raises SessionError."""
        if session_id in self._unwritten and node_id is None:
            return
        self._update(session_id, {"head": node_id})

    def update(
        self,
        session_id: str,
        *,
        title: str | None = None,
        system: str | None = None,
        format: str | None = None,
        model: str | None = None,
    ) -> None:
        """Change what is not None. Raises SessionError."""
        given = {"title": title, "system": system, "format": format, "model": model}
        texts: dict[str, Any] = {name: sound_text(text) for name, text in given.items() if text is not None}
        if session_id in self._unwritten:
            self._unwritten[session_id] = self._unwritten[session_id]._replace(**texts)
        elif texts:
            self._update(session_id, texts)

    def forget_dropped(self, session_id: str) -> None:
        """No turn of the session counts as out of the context any more. Raises SessionError."""
        with self._transaction() as connection:
            connection.execute("UPDATE node SET dropped = 0 WHERE session = ? AND dropped", (session_id,))

    def name_node(self, node_id: int, name: str) -> None:
        """Give a node a branch name; "" takes it away. Raises SessionError."""
        with self._transaction() as connection:
            if not connection.execute("UPDATE node SET name = ? WHERE id = ?", (sound_text(name), node_id)).rowcount:
                raise SessionError(f"there is no turn {node_id}", "`/tree` shows the turns of this session")

    def load(self, session_id: str) -> tuple[Session, list[Node]]:
        """A session by its id or a unique beginning of it, and its nodes, parents before children. Raises SessionError
        when it is missing, ambiguous or damaged."""
        if session_id in self._unwritten:
            return self._unwritten[session_id], []
        found = self._find(session_id.strip().lower())
        with self._reading() as connection:
            row = connection.execute(f"SELECT {SESSION_COLUMNS} FROM session WHERE id = ?", (found,)).fetchone()
            rows = connection.execute(
                f"SELECT {NODE_COLUMNS} FROM node WHERE session = ? ORDER BY id", (found,)
            ).fetchall()
        if row is None:
            raise _gone(found)
        nodes = node_tree(found, rows)
        return session_of(row, nodes), nodes

    def latest(self) -> Session | None:
        """The session that was last talked in. Raises SessionError when it cannot be read."""
        newest = self.sessions()[:1]
        return self.load(newest[0].id)[0] if newest else None

    def sessions(self) -> list[SessionSummary]:
        """Every saved session, the one last talked in first. Raises SessionError when they cannot be read."""
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT id, title, model, ({_LINE_LENGTH}), created, updated, "
                "(SELECT user FROM node WHERE session = session.id ORDER BY id LIMIT 1) "
                "FROM session ORDER BY updated DESC, rowid DESC"
            ).fetchall()
        return [summary_of(row) for row in rows]

    def remove(self, session_id: str) -> None:
        """Delete a session with all its turns. Raises SessionError when there is none of exactly this id."""
        if self._unwritten.pop(session_id, None):
            return
        with self._transaction() as connection:
            connection.execute("DELETE FROM node WHERE session = ?", (session_id,))
            if not connection.execute("DELETE FROM session WHERE id = ?", (session_id,)).rowcount:
                raise _gone(session_id)

    def lock(self, session_id: str) -> SessionLock | None:
        """The right to talk in a session until it is released or the process ends; None while another program has it.
        Raises SessionError for an id that is none."""
        return lock_session(self._folder, session_id)

    def setting(self, key: str) -> str | None:
        """What the program remembers under `key`. Raises SessionError when it cannot be read."""
        with self._reading() as connection:
            row = connection.execute("SELECT value FROM setting WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def set_setting(self, key: str, value: str) -> None:
        """Remember `value` under `key`. Raises SessionError."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO setting (key, value) VALUES (?, ?)", (key, sound_text(value)))

    def _ensure_written(self, connection: sqlite3.Connection, session_id: str) -> None:
        if session := self._unwritten.get(session_id):
            values = tuple(sound_text(value) if isinstance(value, str) else value for value in session)
            _insert(connection, "session", SESSION_COLUMNS, values)
        elif not connection.execute("SELECT 1 FROM session WHERE id = ?", (session_id,)).fetchone():
            raise _gone(session_id)

    def _update(self, session_id: str, values: dict[str, Any]) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._transaction() as connection:
            statement = f"UPDATE session SET {columns}, updated = ? WHERE id = ?"
            if not connection.execute(statement, (*values.values(), time.time(), session_id)).rowcount:
                raise _gone(session_id)

    def _find(self, beginning: str) -> str:
        with self._reading() as connection:
            ids = [str(row[0]) for row in connection.execute("SELECT id FROM session ORDER BY updated DESC")]
        matching = [id for id in ids if beginning and id.startswith(beginning)]
        if beginning in ids or len(matching) == 1:
            return beginning if beginning in ids else matching[0]
        near = matching or difflib.get_close_matches(beginning, ids, 3, 0.5) or ids[:3]
        problem = f"{len(matching)} sessions begin with" if matching else "there is no session"
        hint = f"did you mean {', '.join(near[:5])}? `koala sessions` lists all" if near else "none has been saved yet"
        raise SessionError(f"{problem} {beginning[:40]!r}", hint)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            try:
                yield self._connection
            except (sqlite3.Error, ValueError) as error:
                raise self._failure("read", error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Committed at the end, rolled back on any error."""
        with self._mutex:
            try:
                self._check_file()
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except (sqlite3.Error, struct.error, ValueError, OverflowError) as error:
                raise self._failure("saved", error) from error
            finally:
                with suppress(sqlite3.Error):  # it may be closed
                    self._connection.rollback()

    def _check_file(self) -> None:
        if self.path and _identity(self.path) != self._identity:
            raise SessionError(
                f"{self.path} was moved or removed by another program",
                "this conversation can still be written with /export; start koala again to save new ones",
            )

    def _failure(self, done: str, error: Exception) -> SessionError:
        return SessionError(f"sessions cannot be {done}: {self.path or 'in memory'}: {error}", _hint(error))


def _hint(error: Exception) -> str:
    if is_damage(error):
        return "start koala again: it sets a damaged file aside; /export writes this conversation before that"
    hints = {
        sqlite3.SQLITE_BUSY: "another program is writing to it; try again",
        sqlite3.SQLITE_FULL: "free some disk space; /export writes this conversation elsewhere",
        sqlite3.SQLITE_IOERR: "is the disk full or gone? /export writes this conversation elsewhere",
        sqlite3.SQLITE_READONLY: "is the folder still writable? /export writes this conversation elsewhere",
        sqlite3.SQLITE_CONSTRAINT: "the turn it goes on from is not saved; /export writes this conversation",
    }
    return hints.get(error_code(error), "/export writes this conversation to a file of your choice")


def _gone(session_id: str) -> SessionError:
    hint = "was it removed by another program? `koala sessions` lists all"
    return SessionError(f"there is no session {session_id[:40]!r}", hint)


def _identity(path: Path | None) -> tuple[int, int] | None:
    with suppress(OSError):
        if path:
            status = path.stat()
            return status.st_dev, status.st_ino
    return None


def _insert(connection: sqlite3.Connection, table: str, columns: str, values: Sequence[Any]) -> int:
    marks = ", ".join("?" * len(values))
    return connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", values).lastrowid or 0
