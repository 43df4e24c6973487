"""A user's own dialogues, preference pairs and plain texts, in any of five schemas that are common: messages,
ShareGPT's, Alpaca's, Anthropic's pairs, or {"text"}. A row that has the keys of several is of the first of these:
datasets often carry a dialogue's whole prompt as `text` beside it.

Every token of a plain text is trained on, whatever markers it holds: a file of OIG's rows is a dialogue only as the
source "oig".

`replace(OWN, key=.., title=..)` makes it a source of its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from ..examples import Content
from . import alpaca, hh, sharegpt
from .fields import Role, has_keys, items, paired, read_messages, text
from .source import BadRow, Source, Trimmed

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_Reader = Callable[[Any, Random], Sequence[Content | Trimmed]]


def fits(row: Any) -> bool:
    return _reader(row) is not None


def dialogues(row: Any, random: Random) -> Sequence[Content | Trimmed]:
    """The dialogue, both of a pair, or the text; what is said as it is."""
    reader = _reader(row)
    if reader is None:
        raise BadRow("not of the schema")
    return reader(row, random)


def _reader(row: Any) -> _Reader | None:
    return next((reader for fit, reader in _SCHEMAS if fit(row)), None)


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


_SCHEMAS: tuple[tuple[Callable[[Any], bool], _Reader], ...] = (
    (has_keys("messages"), lambda row, _: [paired(read_messages(row, "messages", "role", "content", _ROLES))]),
    (sharegpt.SHAREGPT.fits, lambda row, _: [paired(sharegpt.messages(row))]),
    (alpaca.ALPACA.fits, lambda row, _: [Dialogue((*_history(row), alpaca.exchange(row)))]),
    (hh.HH.fits, hh.dialogues),
    (has_keys("text"), lambda row, _: [text(row, "text")]),
)

OWN = Source(
    key="own",
    title="your own dialogues or texts",
    schema='rows of one of these schemas: {"messages": [{"role", "content"}]}, '
    'ShareGPT\'s {"conversations": [{"from", "value"}]}, Alpaca\'s {"instruction", "input", "output"}, '
    'Anthropic\'s {"chosen", "rejected"}, or plain {"text"}',
    licence="your own",
    published=0,
    files=(),
    repository="",
    fits=fits,
    dialogues=dialogues,
)
