"""Sequences of token ids from a text or dialogue file, for calibration and verification; or from the texts that come
with the program, which were written for it.

Dialogues are written as Koala writes them, `</s>` included. What was used, and how much of it, is stated in the sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from koala_local.dialogue import BOS, EOS, KOALA, Dialogue, Reply, Text, Turn
from koala_local.errors import KoalaError

_READ = 16 << 20  # bytes of a file that are looked at: ten times what 128 sequences of 2048 tokens take
_PIECE = 1 << 15  # characters that are tokenized at once
_SEQUENCES = 128  # at most, where no number is asked for
_USER = ("user", "human", "prompter")
_REPLY = ("assistant", "gpt", "chatgpt", "bot", "model")

Document = str | Dialogue


class CalibrationError(KoalaError):
    """A calibration text that cannot be read, or holds too little."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What is needed of one: `encode` parses no special token and adds none."""

    encode: Callable[[str], Sequence[int]]
    bos: int | None = None
    eos: int | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents and where they are from, in words for a report."""

    documents: tuple[Document, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Sequences of equal length, each beginning with BOS where the model has one, and what they were cut from."""

    sequences: tuple[tuple[int, ...], ...]
    source: str
    available: int  # tokens that the texts have

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def repeats(self) -> float:
        """How often each token of the texts was used, on average; below 1 where a part was enough."""
        return self.tokens / self.available

    def batches(self) -> list[torch.Tensor]:
        """The sequences as `forward.stream_layers` takes them, (1, tokens) each."""
        return [torch.tensor([ids]) for ids in self.sequences]

    def __str__(self) -> str:
        length = len(self.sequences[0])
        often = f", each used {self.repeats:.1f} times" if self.repeats > 1.05 else ""
        return (
            f"{len(self.sequences)} x {length:,} tokens from {self.source}, which has {self.available:,} tokens{often}"
        )


def builtin_calibration() -> Texts:
    """The text that comes with the program, of several kinds: dialogue, explanation, code, lists, numbers."""
    return _builtin("calibration.txt", "the built-in calibration text")


def builtin_held_out() -> Texts:
    """Another text of the same kinds; no sentence of it is in the calibration text."""
    return _builtin("held_out.txt", "the built-in held-out text")


def _builtin(name: str, source: str) -> Texts:
    return Texts((files(__package__).joinpath(name).read_text("utf-8"),), source)


def read_texts(path: Path) -> Texts:
    """The documents of a file: dialogues of a .jsonl or .json (`messages`, or ShareGPT's `conversations`; what has a
    `text` field is that text), else one plain text. Only the beginning of a long file is read.
    Raises CalibrationError."""
    content, whole = _beginning(path)
    if path.suffix.lower() == ".json" and content.lstrip().startswith("["):
        documents = tuple(_from_array(path, content, whole))
    elif path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        documents = tuple(_from_lines(path, content, whole))
    else:
        documents = (content,)
    part = "" if whole else f" (its first {_READ >> 20} MB)"
    return Texts(documents, f"{path.name}{part}")


def _beginning(path: Path) -> tuple[str, bool]:
    """The text of at most the first `_READ` bytes, and whether that is all."""
    try:
        if not path.is_file():
            raise CalibrationError(f"the calibration text {str(path)!r} is not a file", "check the path")
        with path.open("rb") as file:
            data = file.read(_READ + 1)
    except OSError as error:
        raise CalibrationError(f"{str(path)!r} cannot be read: {error.strerror}", "check its permissions") from None
    whole = len(data) <= _READ
    try:
        return data[:_READ].decode("utf-8-sig"), whole
    except UnicodeDecodeError as error:
        if not whole and error.start > _READ - 4:  # the cut went through a character
            return data[: error.start].decode("utf-8-sig"), whole
        raise CalibrationError(
            f"{str(path)!r} is not UTF-8 text (byte {error.start})", "convert it, for example with iconv"
        ) from None


def _from_array(path: Path, content: str, whole: bool) -> Iterator[Document]:
    if not whole:
        raise CalibrationError(
            f"{str(path)!r} is one JSON list of more than {_READ >> 20} MB", "write one dialogue a line (.jsonl)"
        )
    rows = _parsed(path, content, 1)
    for number, row in enumerate(rows, 1):
        yield _document(path, row, f"entry {number}")


def _from_lines(path: Path, content: str, whole: bool) -> Iterator[Document]:
    lines = content.split("\n")
    if not whole:
        lines.pop()  # its end is missing
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _document(path, _parsed(path, line, number), f"line {number}")


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise CalibrationError(
            f"{str(path)!r}, line {line}, is not JSON", "write one dialogue a line, or name a plain text .txt"
        ) from None


def _document(path: Path, row: Any, where: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    messages = (row.get("messages") or row.get("conversations")) if isinstance(row, dict) else None
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        pairs = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
        if all(isinstance(role, str) and isinstance(text, str) for role, text in pairs):
            return _dialogue(pairs)
    raise CalibrationError(
        f"{str(path)!r}, {where}, is no dialogue",
        'each is {"messages": [{"role": "user", "content": ".."}, ..]} or ShareGPT\'s "conversations"',
    )


def _dialogue(messages: Sequence[tuple[str, str]]) -> Dialogue:
    """User and reply in turn. Several messages in a row of one side are joined; what precedes the first question, and
    roles other than these, go to the system text."""
    system: list[str] = []
    turns: list[tuple[list[str], list[str]]] = []
    for role, text in messages:
        if role in _USER and (not turns or turns[-1][1]):
            turns.append(([text], []))
        elif role in _USER:
            turns[-1][0].append(text)
        elif role in _REPLY and turns:
            turns[-1][1].append(text)
        else:
            system.append(text)
    written = tuple(Turn("\n".join(asked), "\n".join(said) if said else None) for asked, said in turns)
    return Dialogue(written, "\n".join(system))


def make_sample(
    texts: Texts, tokenizer: Tokenizer, *, length: int = 2048, sequences: int | None = None, most: int = _SEQUENCES
) -> Sample:
    """`sequences` sequences of `length` tokens, spread evenly over the texts. Without a number, as many as the texts
    fill without repeating themselves, `most` at most; with one, they are repeated as often as needed.
    Raises CalibrationError when there is hardly any text."""
    ids = [token for document in texts.documents for token in _tokens(document, tokenizer)]
    head = [] if tokenizer.bos is None else [tokenizer.bos]
    body = length - len(head)
    if body < 1 or len(ids) < 2:
        raise CalibrationError(f"there is hardly any text in {texts.source}: {len(ids)} tokens", "give a longer one")
    if sequences is None:
        sequences = min(most, max(1, len(ids) // body))
        body = min(body, len(ids))
    return Sample(
        tuple((*head, *_window(ids, start, body)) for start in _starts(ids, body, sequences)), texts.source, len(ids)
    )


def _starts(ids: Sequence[int], body: int, sequences: int) -> Iterable[int]:
    """Where sequences begin: evenly spread over a text with room to spare, one after the other where it repeats."""
    if sequences * body > len(ids):
        return [index * body % len(ids) for index in range(sequences)]
    return [index * (len(ids) - body) // max(1, sequences - 1) for index in range(sequences)]


def _window(ids: Sequence[int], start: int, count: int) -> list[int]:
    """`count` ids from `start` on, beginning again at the end."""
    window = list(ids[start : start + count])
    while len(window) < count:
        window += ids[: count - len(window)]
    return window


def _tokens(document: Document, tokenizer: Tokenizer) -> Iterator[int]:
    if isinstance(document, str):
        for piece in _pieces(document):
            yield from tokenizer.encode(piece)
        return
    control = {BOS: tokenizer.bos, EOS: tokenizer.eos}
    for segment in KOALA.segments(document):
        if isinstance(segment, Text | Reply):
            yield from tokenizer.encode(segment.text)
        elif (token := control.get(segment)) is not None:
            yield token


def _pieces(text: str) -> Iterator[str]:
    """The text in parts that end at a line's end: tokenizers slow down on megabytes at once."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PIECE) + 1
        if start + _PIECE >= len(text) or end <= start:
            end = min(start + _PIECE, len(text))
        yield text[start:end]
        start = end
