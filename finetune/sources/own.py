"""A user's own dialogues, in any of three schemas that are common: messages, ShareGPT's or Alpaca's.

`replace(OWN, key=.., title=..)` makes it a source of its own name.
"""

from __future__ import annotations

from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from . import alpaca, sharegpt
from .fields import Message, Role, items, paired, text
from .source import BadRow, Source

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def fits(row: Any) -> bool:
    return isinstance(row, dict) and ("messages" in row or sharegpt.SHAREGPT.fits(row) or alpaca.ALPACA.fits(row))


def dialogues(row: Any, random: Random) -> list[Dialogue]:
    """The dialogue, its texts as they are."""
    if not fits(row):
        raise BadRow("not of the schema")
    if "messages" in row:
        return [paired(_messages(row))]
    if "conversations" in row:
        return [paired(sharegpt.messages(row))]
    return [Dialogue((*_history(row), alpaca.exchange(row)))]


def _messages(row: Any) -> list[Message]:
    found: list[Message] = []
    for message in items(row, "messages"):
        role = _ROLES.get(text(message, "role"))
        if role is None:
            raise BadRow("an unknown role")
        found.append((role, text(message, "content")))
    return found


def _history(row: Any) -> list[Turn]:
    """The earlier exchanges of an Alpaca row that has some: [[instruction, output], ..]."""
    if row.get("history") is None:
        return []
    turns = []
    for pair in items(row, "history"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise BadRow("'history' is not a list of pairs of texts")
        turns.append(Turn(*pair))
    return turns


OWN = Source(
    key="own",
    title="your own dialogues",
    schema='rows of one of three schemas: {"messages": [{"role", "content"}]}, '
    'ShareGPT\'s {"conversations": [{"from", "value"}]}, or Alpaca\'s {"instruction", "input", "output"}',
    licence="your own",
    published=0,
    files=(),
    repository="",
    fits=fits,
    dialogues=dialogues,
)
