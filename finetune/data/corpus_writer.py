"""Writes a corpus: examples stream in, their tokens are made by some processes, and stream out in the same order."""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from koala_local.disk import FULL, sync, write_whole

from .corpus import (
    FILES,
    MANIFEST,
    MOST_SOURCES,
    TYPES,
    CorpusError,
    Counts,
    Manifest,
    parse_manifest,
    token_type,
)
from .examples import Example
from .tokens import DialogueTokenizer
from .workers import Workers, batches

_CHUNK = 256  # examples that travel to a process together

Progress = Callable[[int], None]  # documents so far


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some documents as they lie in the files; `lengths` and `turns` are of each document."""

    tokens: bytes
    trained: bytes
    lengths: NDArray[np.int64]
    turns: NDArray[np.int64]
    places: bytes
    trained_counts: NDArray[np.int64]


def write_corpus(
    examples: Iterable[tuple[Example, bool]],
    tokenizer: DialogueTokenizer,
    folder: Path,
    *,
    inputs: Mapping[str, str],
    recipe: Mapping[str, Any],
    work: Workers | None = None,
    progress: Progress = lambda documents: None,
) -> Manifest:
    """Write a corpus into the folder, which may hold other files. Its manifest gets its name last: without it there is
    no corpus. `examples` come with whether they are held out; `inputs` are hashes by name; `work` makes the tokens
    (None: this process does). The bytes do not depend on that, and memory does not grow with the examples.

    Raises CorpusError: an example without a reply, a folder that has a corpus, or a disk that is full."""
    if (folder / MANIFEST).exists():
        raise CorpusError(f"{str(folder)!r} has a corpus already", "name a new folder, or remove that one")
    partial = folder / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        try:
            made = _write(examples, tokenizer, partial, work or Workers(None, 1), progress)
            text = _manifest(made, tokenizer, inputs, recipe).to_json().encode()
            write_whole(partial / MANIFEST, [text])
            for name in (*(f"{name}.bin" for name in FILES), MANIFEST):
                os.replace(partial / name, folder / name)
            sync(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        hint = "free some space" if error.errno in FULL else "check the path and its permissions"
        raise CorpusError(f"the corpus {str(folder)!r} cannot be written: {error.strerror}", hint) from None
    return parse_manifest(text, folder / MANIFEST)


class _File:
    """A file that knows its hash."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> tuple[int, str]:
        self._file.close()
        sync(self.path)
        return self.size, self._hash.hexdigest()


@dataclass(slots=True)
class _Made:
    """What is known once the files are written."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    sources: dict[str, list[int]] = field(default_factory=dict)  # name: the numbers of its Counts


def _write(
    examples: Iterable[tuple[Example, bool]],
    tokenizer: DialogueTokenizer,
    folder: Path,
    work: Workers,
    progress: Progress,
) -> _Made:
    files = {name: _File(folder / f"{name}.bin") for name in FILES}
    made = _Made()
    try:
        for name in ("documents", "turns"):
            files[name].write(np.zeros(1, TYPES[name]).tobytes())
        documents = tokens = turns = 0
        chunks = ((tokenizer, chunk) for chunk in batches(examples, _CHUNK))
        for (_, chunk), done in work.map(_tokenize, chunks):
            files["tokens"].write(done.tokens)
            files["trained"].write(done.trained)
            files["places"].write(done.places)
            files["documents"].write((tokens + done.lengths.cumsum()).astype(TYPES["documents"]).tobytes())
            files["turns"].write((turns + done.turns.cumsum()).astype(TYPES["turns"]).tobytes())
            files["sources"].write(_count(made, chunk, done))
            files["held_out"].write(bytes(held_out for _, held_out in chunk))
            documents, tokens = documents + len(chunk), tokens + int(done.lengths.sum())
            turns += int(done.turns.sum())
            progress(documents)
    finally:
        made.files = {name: file.close() for name, file in files.items()}
    return made


def _count(made: _Made, chunk: list[tuple[Example, bool]], done: _Chunk) -> bytes:
    """Add the chunk to the counts; the index of each document's source."""
    order = {name: index for index, name in enumerate(made.sources)}
    indices = np.empty(len(chunk), TYPES["sources"])
    for place, (example, held_out) in enumerate(chunk):
        index = order.setdefault(example.source, len(order))
        if index >= MOST_SOURCES:
            raise CorpusError(f"there are more than {MOST_SOURCES} sources", "give several the same name")
        indices[place] = index
        counts = made.sources.setdefault(example.source, [0, 0, 0, 0])
        if held_out:
            counts[1] += 1
        else:
            counts[0] += 1
            counts[2] += int(done.lengths[place])
            counts[3] += int(done.trained_counts[place])
    return indices.tobytes()


def _manifest(
    made: _Made, tokenizer: DialogueTokenizer, inputs: Mapping[str, str], recipe: Mapping[str, Any]
) -> Manifest:
    sources = {name: Counts(*numbers) for name, numbers in made.sources.items()}
    return Manifest(tokenizer.key, tokenizer.size, tokenizer.format.key, inputs, recipe, sources, made.files)


def _tokenize(work: tuple[DialogueTokenizer, list[tuple[Example, bool]]]) -> _Chunk:
    """What one process does."""
    tokenizer, examples = work
    tokens, trained, places = array("I"), bytearray(), array("i")
    lengths, turns, counts = [], [], []
    for example, _ in examples:
        _check(example)
        found = tokenizer.encode(example.content)
        tokens.extend(found.ids)
        trained += found.trained
        for prompt, reply in zip(found.prompts, found.replies, strict=True):
            places.extend((prompt, reply))
        lengths.append(len(found.ids))
        turns.append(len(found.prompts))
        counts.append(sum(found.trained))
    return _Chunk(
        np.frombuffer(tokens, "u4").astype(token_type(tokenizer.size)).tobytes(),
        bytes(trained),
        np.array(lengths, np.int64),
        np.array(turns, np.int64),
        np.frombuffer(places, "i4").astype(TYPES["places"]).tobytes(),
        np.array(counts, np.int64),
    )


def _check(example: Example) -> None:
    if isinstance(example.content, str):
        return
    turns = example.content.turns
    if not turns or any(turn.reply is None for turn in turns):
        what = f"{example.source}, {example.row}: " + ("a turn has no reply" if turns else "there is no turn")
        raise CorpusError(f"{what}: there is nothing to learn from it", "leave the row out")
