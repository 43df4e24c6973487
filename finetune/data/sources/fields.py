"""What the sources' modules share: the fields of untrusted rows, and messages into turns. All raise BadRow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, Literal

from koala_local.dialogue import Dialogue, Turn

from .source import BadRow, Trimmed

Role = Literal["system", "user", "assistant"]
Message = tuple[Role, str]


def has_keys(*keys: str) -> Callable[[Any], bool]:
    """Whether a row is an object with all of these keys."""
    return lambda row: isinstance(row, dict) and all(key in row for key in keys)


def field(row: Any, key: str) -> Any:
    if not isinstance(row, dict):
        raise BadRow("not an object")
    if key not in row:
        raise BadRow(f"no {key!r}")
    return row[key]


def text(row: Any, key: str) -> str:
    value = field(row, key)
    if not isinstance(value, str):
        raise BadRow(f"{key!r} is not text")
    return value


def items(row: Any, key: str) -> list[Any]:
    value = field(row, key)
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is not a list")
    return value


def texts(row: Any, key: str) -> list[str]:
    found = items(row, key)
    if not all(isinstance(each, str) for each in found):
        raise BadRow(f"{key!r} holds what is not text")
    return found


def read_messages(row: Any, key: str, role: str, said: str, roles: Mapping[str, Role]) -> list[Message]:
    """The messages in the list under `key`; under these keys each has its role, one of `roles`, and its text."""
    found: list[Message] = []
    for message in items(row, key):
        who = roles.get(text(message, role))
        if who is None:
            raise BadRow("an unknown role")
        found.append((who, text(message, said)))
    return found


def split_speech(said: str, user: str, assistant: str, before: str = "") -> list[Message]:
    """The stripped messages of a text in which the pattern `before` and then one of the two markers open each. What
    stands before the first marker is left out."""
    marker = f"{before}({re.escape(user)}|{re.escape(assistant)})"
    pieces = re.split(marker, said)[1:]
    return [
        ("user" if marker == user else "assistant", piece.strip())
        for marker, piece in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def paired(messages: Iterable[Message], *, helpful: bool = True) -> Trimmed:
    """The dialogue of the messages. Messages of one role in a row become one, with an empty line between them, but for
    blank ones. Replies before the first user message are dropped, as is a user message at the end."""
    runs = [
        (role, "\n\n".join(filter(str.strip, said)) if len(said) > 1 else said[0])
        for role, group in groupby(messages, lambda message: message[0])
        if (said := [text for _, text in group])
    ]
    system = runs.pop(0)[1] if runs and runs[0][0] == "system" else ""
    if any(role == "system" for role, _ in runs):
        raise BadRow("a system message after the first message")
    start = int(bool(runs) and runs[0][0] == "assistant")
    end = len(runs) - (len(runs) - start) % 2
    spoken = runs[start:end]
    turns = tuple(Turn(user, reply, helpful) for (_, user), (_, reply) in zip(spoken[::2], spoken[1::2], strict=True))
    return Trimmed(Dialogue(turns, system), tuple(said for _, said in (*runs[:start], *runs[end:])))
