"""What a source of raw dialogues is. Each source's own module says how one raw row becomes dialogues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from koala_local.dialogue import Dialogue
from koala_local.errors import KoalaError

from ..examples import Content


class BadRow(Exception):
    """A raw row that cannot be used; the text says why. It is counted, reported and skipped. The text is one of few:
    it names the field, never the value."""


class WrongSchema(KoalaError):
    """A raw file that is not of its source's schema at all."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """A dialogue, and what the messages say that its source leaves out of it."""

    dialogue: Dialogue
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A raw dataset in its published format."""

    key: str  # "sharegpt"
    title: str  # "ShareGPT"
    schema: str  # in words, for errors: 'an array of {"id", "conversations": [{"from", "value"}]}'
    licence: str
    published: int  # examples (of preference data: pairs), as published of Koala; 0 where nothing is
    files: tuple[str, ...]  # their names at the hub; on disk each may be compressed (.gz, .xz)
    repository: str  # at the hub; empty: none
    fits: Callable[[Any], bool]  # whether a row has the keys of the schema; their values are still to be checked
    dialogues: Callable[[Any, Random], Sequence[Content | Trimmed]]  # of a row, drawing from the generator only. Raises
    # BadRow. What is blank in one is judged later, for each alone: `reading.check`. Only a user's own rows may be text.
    converted: tuple[str, ...] = ()  # names in the hub's own conversion to Parquet, where `files` may not be there
