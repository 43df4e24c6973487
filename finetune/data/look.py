"""A built corpus, looked at: its report, and single examples with what is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from koala_local.errors import KoalaError
from koala_local.models.json_file import read_object

from .build import MIX, REPORT, TOKENIZER
from .corpus import Corpus, open_corpus
from .examples import from_line, read_lines
from .tokens import DialogueTokenizer


class LookError(KoalaError):
    """A corpus that has not what is asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """An example of a corpus. `runs` are its tokens' text, joined where they are trained on alike."""

    index: int
    source: str
    row: str
    tokens: int
    trained: int
    held_out: bool
    runs: tuple[tuple[str, bool], ...]


def read_report(folder: Path) -> dict[str, Any]:
    """The report of the build. Raises LookError, ModelFileError."""
    if not (folder / REPORT).is_file():
        raise LookError(f"{str(folder)!r} has no {REPORT}: it is no corpus", "koala data build makes one")
    return read_object(folder / REPORT)


def look(folder: Path, source: str | None = None, number: int | None = None) -> Found:
    """The example of that number, counted from 0, of the corpus or of one of its sources; any for None.
    Raises LookError, CorpusError."""
    corpus = open_corpus(folder)
    tokenizer = DialogueTokenizer(folder / TOKENIZER)
    index = _choose(corpus, source, number)
    line = next(islice(read_lines(folder / MIX), index, None))
    ids, trained = corpus.document(index)
    return Found(
        index,
        corpus.source_names[corpus.sources[index]],
        from_line(line).row,
        len(ids),
        int(trained.sum()),
        bool(corpus.held_out[index]),
        tuple(_runs(tokenizer, ids.tolist(), trained.tolist())),
    )


def _choose(corpus: Corpus, source: str | None, number: int | None) -> int:
    if source is not None and source not in corpus.source_names:
        raise LookError(f"the corpus has no source {source!r}", f"its sources are {', '.join(corpus.source_names)}")
    mine = np.arange(len(corpus)) if source is None else np.flatnonzero(_is_of(corpus, source))
    if number is None:
        number = Random().randrange(len(mine))
    if number >= len(mine):
        where = f"the source {source!r}" if source else "the corpus"
        raise LookError(f"{where} has no example {number}", f"there are {len(mine):,}, counted from 0")
    return int(mine[number])


def _is_of(corpus: Corpus, source: str) -> Any:
    return corpus.sources == corpus.source_names.index(source)


def _runs(tokenizer: DialogueTokenizer, ids: list[int], trained: list[int]) -> Iterator[tuple[str, bool]]:
    names = {token: text.encode() for text, token in tokenizer.vocabulary.control.items()}
    for flag, group in groupby(zip(ids, trained, strict=True), lambda each: each[1]):
        pieces = (names.get(token) or tokenizer.piece(token) for token, _ in group)
        yield b"".join(pieces).decode("utf-8", "replace"), bool(flag)
