"""What a conversation consists of: turns, the lines of their tree, sessions; and how rows of the database become it.

The database is checked when it is opened, but no checksum covers its rows: what is read here may be of a wrong type.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from koala_local.errors import SessionError


class Node(NamedTuple):
    """One finished turn. Its path to the root is the conversation that led to it."""

    id: int  # larger than its parent's
    parent: int | None
    user: str
    reply: str
    finish: str
    reply_ids: tuple[int, ...]  # empty where none were kept
    vocabulary: str  # the vocabulary key under which reply_ids mean something
    attempt: int
    dropped: int  # how many oldest turns of its path had left the context when it was evaluated
    name: str  # the branch name that the user gave, or ""; several nodes may carry the same
    created: float


class Branch(NamedTuple):
    """A line of the conversation: its last turn, and the number to switch to it by."""

    number: int
    last: Node
    turns: int
    current: bool


class Session(NamedTuple):
    """What all turns of a session share. `head` is the node that was talked at last; None is before the first turn."""

    id: str
    title: str
    system: str
    format: str
    model: str
    seed: int
    head: int | None
    created: float
    updated: float


class SessionSummary(NamedTuple):
    """A line of the list of sessions. The title is the one given, else the beginning of the first message."""

    id: str
    title: str
    model: str
    turns: int  # of the line that goes on
    created: float
    updated: float


SESSION_COLUMNS = "id, title, system, format, model, seed, head, created, updated"
NODE_COLUMNS = "id, parent, user, reply, finish, reply_ids, vocabulary, attempt, dropped, name, created"
_TITLE_LENGTH = 60


def sound_text(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _title(text: str) -> str:
    words = " ".join(text[:1000].split())
    return words if len(words) <= _TITLE_LENGTH else words[: _TITLE_LENGTH - 1].rstrip() + "…"


def _time(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32. Raises struct.error for one that does not fit."""
    return struct.pack(f"<{len(ids)}I", *ids)


def _unpack_ids(blob: object) -> tuple[int, ...]:
    """The ids, or none where the blob is damaged: the text can be tokenized again."""
    if not isinstance(blob, bytes) or len(blob) % 4:
        return ()
    ids = struct.unpack(f"<{len(blob) // 4}I", blob)
    return ids if max(ids, default=0) < 1 << 31 else ()


def node_tree(session_id: str, rows: list[tuple[Any, ...]]) -> list[Node]:
    """The nodes of rows of NODE_COLUMNS. Raises SessionError if a type is wrong or a parent comes after its child."""
    nodes: list[Node] = []
    known: set[int | None] = {None}
    for id, parent, *texts, reply_ids, vocabulary, attempt, dropped, name, created in rows:
        numbers = [type(value) is int for value in (id, attempt, dropped)]
        strings = [isinstance(value, str) for value in (*texts, vocabulary, name)]
        if not all(numbers + strings) or parent not in known:
            raise _damaged(f"turn {id} of session {session_id}")
        known.add(id)
        user, reply, finish = texts
        ids = _unpack_ids(reply_ids)
        nodes.append(Node(id, parent, user, reply, finish, ids, vocabulary, attempt, dropped, name, _time(created)))
    return nodes


def sound_ids(node: Node, vocabulary_size: int) -> tuple[int, ...] | None:
    """The ids of a reply; None where a damaged row has lost them, or has impossible ones."""
    sound = all(token < vocabulary_size for token in node.reply_ids)
    return node.reply_ids if sound and (node.reply_ids or not node.reply) else None


def dropped_turns(path: Sequence[Node]) -> int:
    """How many turns of a path have left the context. A damaged row may name any number: the last turn never does."""
    return min(max(path[-1].dropped, 0), len(path) - 1) if path else 0


def reply_seed(session_seed: int, turn: int, attempt: int) -> int:
    """The seed of one reply: a run repeats, another attempt differs. 32 bits."""
    text = f"{session_seed}/{turn}/{attempt}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


def summary_of(row: tuple[Any, ...]) -> SessionSummary:
    """A line of the list from (id, title, model, turns, created, updated, first message); damaged texts are shown."""
    id, title, model, turns, created, updated, first = row
    return SessionSummary(str(id), _title(str(title or first or "")), str(model), turns, _time(created), _time(updated))


def session_of(row: tuple[Any, ...], nodes: list[Node]) -> Session:
    """The session of a row of SESSION_COLUMNS; a head that is none of its nodes becomes the newest one. Raises
    SessionError where types are wrong."""
    id, *texts, seed, head, created, updated = row
    if not all(isinstance(text, str) for text in texts) or type(seed) is not int:
        raise _damaged(f"session {id}")
    if head is not None and head not in {node.id for node in nodes}:
        head = nodes[-1].id if nodes else None
    title, system, format, model = texts
    title = title or (_title(nodes[0].user) if nodes else "")
    return Session(id, title, system, format, model, seed, head, _time(created), _time(updated))


def _damaged(what: str) -> SessionError:
    return SessionError(f"{what} is damaged in the saved sessions", "`koala sessions` lists the other ones")


def path_to(nodes: Mapping[int, Node], head: int | None) -> list[Node]:
    """The turns from the first one to `head`."""
    path: list[Node] = []
    while head is not None:
        path.append(nodes[head])
        head = path[-1].parent
    return path[::-1]


def lines(nodes: Mapping[int, Node], head: int | None) -> list[Branch]:
    """Every line of the tree. A turn goes on with its parent's line where it is the first to do so and no name ends
    that line; else it begins a line. So a line keeps its number whatever comes later."""
    line_of: dict[int | None, int] = {}
    ends: list[int] = []
    ended: set[int | None] = {None}
    for node in sorted(nodes.values(), key=lambda node: (node.id < 0, abs(node.id))):
        if node.parent is None or node.parent in ended or nodes[node.parent].name:
            line_of[node.id] = len(ends)
            ends.append(node.id)
        else:
            line_of[node.id] = line_of[node.parent]
            ends[line_of[node.id]] = node.id
        ended.add(node.parent)
    current = line_of.get(head)
    return [
        Branch(line + 1, nodes[end], len(path_to(nodes, end)), current=line == current) for line, end in enumerate(ends)
    ]
