"""Raw files of one source -> examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

from koala_local.dialogue import Dialogue

from ..examples import Content, Example, texts
from ..raw_files import RawFileError, Row, Skipped, rows, unpacked_name
from .source import BadRow, Source, Trimmed, WrongSchema

HEAD = 100  # rows among which one must be of the schema
_SHOWN_KEYS = 8


def read_source(source: Source, paths: Sequence[Path], seed: int) -> Iterator[Example | Skipped]:
    """The examples of the files, in order: one for each dialogue or text of a row, all with the row's name, or what is
    skipped and why. A row's draws follow from the seed, the source and the row's name alone, so reading the files apart
    gives the same.

    Raises RawFileError for a file that cannot be read to its end or holds nothing, WrongSchema where none of its first
    rows is of the schema."""
    for path in paths:
        for row in _of_schema(source, path):
            if isinstance(row, Skipped):
                yield row
            else:
                yield from _examples(source, row, seed)


def check(content: Content) -> None:
    """Raise BadRow unless all of it can be trained on."""
    if isinstance(content, str):
        if not content.strip():
            raise BadRow("an empty text")
    else:
        _check_turns(content)
    try:
        for text in texts(content):
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("half a character (a lone surrogate)") from None


def _check_turns(dialogue: Dialogue) -> None:
    if not dialogue.turns:
        raise BadRow("only a system message" if dialogue.system else "no user message with a reply")
    if not all(turn.user.strip() for turn in dialogue.turns):
        raise BadRow("an empty user message")
    if not all(turn.reply and turn.reply.strip() for turn in dialogue.turns):
        raise BadRow("an empty reply")


def label(source: Source, path: Path) -> str:
    """The name of a raw file in its rows' names: that of the file, after the folders that the published name has."""
    name = unpacked_name(path.name)
    for published in map(PurePosixPath, source.files):
        folders = published.parent.parts
        if folders and unpacked_name(published.name) == name and path.parent.parts[-len(folders) :] == folders:
            return str(published.with_name(name))
    return name


def _examples(source: Source, row: Row, seed: int) -> Iterator[Example | Skipped]:
    name, value = row
    try:
        found = source.dialogues(value, Random(f"{seed} {source.key} {name}"))
    except BadRow as error:
        yield Skipped(name, str(error))
        return
    for each in found:
        content, dropped = (each.dialogue, each.dropped) if isinstance(each, Trimmed) else (each, ())
        try:
            check(content)
        except BadRow as error:
            yield Skipped(name, str(error))
        else:
            yield Example(content, source.key, name, dropped)


def _of_schema(source: Source, path: Path) -> Iterator[Row | Skipped]:
    """The file's rows, once one of the first is found to be of the schema."""
    head: list[Row | Skipped] = []
    rest = rows(path, label(source, path))
    for row in rest:
        head.append(row)
        if not isinstance(row, Skipped) and source.fits(row[1]):
            return chain(head, rest)
        if len(head) == HEAD:
            break
    if not head:
        raise RawFileError(f"{str(path)!r} holds no rows", "give a file that is complete")
    what = f"{str(path)!r} is not a file of {source.title}: {_found(head)}"
    raise WrongSchema(what, f"expected is {source.schema}; as JSON Lines, one JSON array, or Parquet")


def _found(head: Sequence[Row | Skipped]) -> str:
    first = head[0]
    start = f"none of its first {len(head)} rows fits; " if len(head) > 1 else "its only row does not fit; "
    if isinstance(first, Skipped):
        return f"{start}the first is {first.reason}"
    return f"{start}the first is {_shown(first[1])}"


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, not an object"
    keys = ", ".join(repr(key[:40]) for key in list(value)[:_SHOWN_KEYS])
    return f"an object with the keys {keys}{', ..' if len(value) > _SHOWN_KEYS else ''}" if value else "an empty object"
