"""Dialogues and plain texts into token ids, with what is trained on marked: a dialogue's ids are those of chat.

Every field of the prompt format is tokenized on its own. Loss is on a reply's tokens and on the control token that
closes it; of a plain text, on all but BOS. Nothing in either becomes a control token, whatever it spells.

Both readers are this program's own (sentencepiece, or tokenizers with special tokens unparsed), so what transformers
makes of a tokenizer does not matter here: a byte-level one keeps its spaces, and a format's spaced reply gets one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from koala_local.dialogue import BOS, EOS, KOALA, Control, Dialogue, PromptFormat, Reply, Segment, Text, Turn
from koala_local.engine.base import Engine, Vocabulary
from koala_local.engine.gptq_tokenizer import Expected, GptqTokenizer
from koala_local.engine.plain_text import PlainText
from koala_local.errors import KoalaError
from koala_local.models.json_file import read_optional

from .examples import Content

_words = re.compile(r"[ \n]*[^ \n]+|[ \n]+").findall  # each with the spaces and line ends before it
_REMEMBERED, _LONGEST_WORD = 200_000, 64  # words at a time, characters of one
_SUFFIXES = {".model": "tokenizer.model", ".json": "tokenizer.json"}


class TokenizerError(KoalaError):
    """A tokenizer that is missing, or not fit to train the model with."""


@dataclass(frozen=True, slots=True)
class TokenizedDialogue:
    """A dialogue as tokens. Turn i lies in `ids` from prompts[i] to prompts[i + 1], the last one to the end; its reply
    begins at replies[i]. What is before prompts[0] belongs to all turns: BOS, the format's header and the system text.
    A plain text is one turn whose prompt is empty."""

    ids: list[int]
    trained: bytearray  # of each token: 1 where there is loss on it
    prompts: list[int]
    replies: list[int]


class DialogueTokenizer:
    """Writes dialogues in one format with one tokenizer. Pickles as its path: the file is read again."""

    def __init__(self, path: Path, vocabulary_size: int | None = None, format: PromptFormat = KOALA) -> None:
        """`path`: a checkpoint folder, a tokenizer.model or a tokenizer.json. `vocabulary_size`: the rows of the
        model's embedding, where known. Raises TokenizerError, or ModelFileError for a damaged file."""
        self.path, self.format = path, format
        tokenizer = _read(path)
        self.vocabulary: Vocabulary = tokenizer.vocabulary
        self.size = self.vocabulary.size  # tokens, counted to the highest id
        self.key = self.vocabulary.key  # equal for tokenizers that give the same ids, whatever rows the model adds
        self._pieces, self._tokenize = tokenizer.pieces, tokenizer.tokenize
        # PlainText asks an engine for nothing but these two: `tokenize` and `vocabulary`.
        engine = _Words(tokenizer) if tokenizer.apart else tokenizer
        self._content = PlainText(cast(Engine, engine), format.markers)
        self._header = lru_cache(maxsize=64)(self._find_header)
        _check_special(self.vocabulary, path)
        if vocabulary_size is not None:
            check_matches(self, vocabulary_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.path, self.format)

    @property
    def bos(self) -> int:
        return cast(int, self.vocabulary.bos)

    @property
    def eos(self) -> int:
        return cast(int, self.vocabulary.eos)

    def piece(self, token: int) -> bytes:
        """The bytes of a token, possibly half a character; empty for a control token."""
        return self._pieces[token]

    def encode(self, content: Content) -> TokenizedDialogue:
        """The tokens of a dialogue or plain text. Where the last turn has no reply they end where it would begin."""
        if isinstance(content, str):
            return self._encode_text(content)
        found = self._encode(content)
        if found.prompts:
            header = self._header(content.system)
            fits = tuple(found.ids[: len(header)]) == header
            found.prompts[0] = len(header) if fits else self._leading_controls(content)
        return found

    def _encode_text(self, text: str) -> TokenizedDialogue:
        """BOS, the text, EOS. Nothing predicts a document's first token, so that is never trained on, BOS or not."""
        header = self._control_ids(BOS)
        ids = [*header, *self._content.ids(text), self.eos]
        return TokenizedDialogue(ids, bytearray([0, *[1] * (len(ids) - 1)]), [len(header)], [1])

    def _encode(self, dialogue: Dialogue) -> TokenizedDialogue:
        """As `encode`, the header counted to the first turn."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        prompts, replies = [0], []
        after_reply = False
        for segment in self.format.segments(dialogue):
            start = len(ids)
            ids += self._ids(segment)
            if isinstance(segment, Reply):
                replies.append(start)
                spans.append((start, len(ids)))
                prompts.append(len(ids))
            elif after_reply and isinstance(segment, Control):  # it closes the reply, and is learned with it
                spans.append((start, len(ids)))
                prompts[-1] = len(ids)
            after_reply = isinstance(segment, Reply)
        trained = bytearray(len(ids))
        for start, end in spans:
            trained[start:end] = b"\1" * (end - start)
        if len(replies) < len(dialogue.turns):
            replies.append(len(ids))
        return TokenizedDialogue(ids, trained, prompts[: len(dialogue.turns)], replies)

    def _ids(self, segment: Segment) -> Sequence[int]:
        match segment:
            case Control():
                return self._control_ids(segment)
            case Text():
                return self._content.ids(segment.text)
            case Reply():
                if segment.spaced and not self.vocabulary.adds_space:
                    return self._content.ids(f" {segment.text}")
                return self._content.ids(segment.text, continues=not segment.spaced)

    def _control_ids(self, control: Control) -> Sequence[int]:
        vocabulary = self.vocabulary
        if control == BOS:
            return (self.bos,) if vocabulary.add_bos else ()
        if control == EOS:
            return (self.eos,)
        token = vocabulary.control.get(control.text, vocabulary.user_defined.get(control.text))
        return (token,) if token is not None else self._tokenize(control.text)

    def _find_header(self, system: str) -> tuple[int, ...]:
        """What a first turn has before it that a later one has not; where the two do not differ by whole tokens, the
        control tokens at the start."""
        whole = Turn("x", "x")
        first = self._encode(Dialogue((Turn("x"),), system)).ids
        before = self._encode(Dialogue((whole,), system)).ids
        later = self._encode(Dialogue((whole, Turn("x")), system)).ids[len(before) :]
        if first[len(first) - len(later) :] == later:
            return tuple(first[: len(first) - len(later)])
        return tuple(first[: self._leading_controls(Dialogue((whole,), system))])

    def _leading_controls(self, dialogue: Dialogue) -> int:
        count = 0
        for segment in self.format.segments(dialogue):
            if not isinstance(segment, Control):
                break
            count += len(self._control_ids(segment))
        return count


class _Words:
    """A tokenizer whose words can be tokenized apart, with a memory of them: to look one up is several times faster."""

    def __init__(self, tokenizer: GptqTokenizer) -> None:
        self.vocabulary, self._tokenizer = tokenizer.vocabulary, tokenizer
        self._first = _Memory(tokenizer.tokenize)  # a word at the start of a text
        self._inside = _Memory(self._tokenize_inside)

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """As `Engine.tokenize`."""
        words = _words(text)
        first = [] if continues or not words else self._first[words.pop(0)]
        return [*first, *chain.from_iterable(map(self._inside.__getitem__, words))]

    def _tokenize_inside(self, word: str) -> list[int]:
        if self.vocabulary.adds_space and word[0] == " " != word:
            return self._tokenizer.tokenize(word[1:])  # it puts the space there
        return self._tokenizer.tokenize(word, continues=True)


class _Memory(dict[str, list[int]]):
    """The ids of words, found when they are asked for; long ones are not kept."""

    def __init__(self, tokenize: Callable[[str], list[int]]) -> None:
        self._tokenize = tokenize

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenize(word)
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = ids
        return ids


def check_matches(tokenizer: DialogueTokenizer, vocabulary_size: int) -> None:
    """Raises TokenizerError when the model has no row for some token of the tokenizer."""
    if tokenizer.size > vocabulary_size:
        what = f"the tokenizer has {tokenizer.size} tokens, the model's embedding {vocabulary_size} rows"
        raise TokenizerError(what, "they are not of one model: give the tokenizer that came with the checkpoint")


@lru_cache(maxsize=4)
def _again(path: Path, format: PromptFormat) -> DialogueTokenizer:
    return DialogueTokenizer(path, None, format)


def _read(path: Path) -> GptqTokenizer:
    if path.is_dir():
        if not any((path / name).is_file() for name in _SUFFIXES.values()):
            what = f"the base {str(path)!r} has no tokenizer (tokenizer.model or tokenizer.json)"
            raise TokenizerError(what, "copy the tokenizer that belongs to this model into the folder")
        return _read_folder(path)
    if not path.is_file() or path.suffix not in _SUFFIXES:
        what = "is no tokenizer.model and no tokenizer.json" if path.exists() else "does not exist"
        raise TokenizerError(f"{str(path)!r} {what}", "give a checkpoint folder, or the file of a tokenizer")
    with TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder, _SUFFIXES[path.suffix]))
        return _read_folder(Path(folder))


def _read_folder(folder: Path) -> GptqTokenizer:
    config = read_optional(folder / "config.json")
    bos, *_ = *_numbers(config.get("bos_token_id")), None
    eos = _numbers(config.get("eos_token_id"))
    return GptqTokenizer(folder, Expected(None, bos, eos))


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int and number >= 0)


def _check_special(vocabulary: Vocabulary, path: Path) -> None:
    for name, token in (("BOS", vocabulary.bos), ("EOS", vocabulary.eos)):
        if token is None or token >= vocabulary.size:
            what = f"the tokenizer of {str(path)!r} names no {name} token"
            raise TokenizerError(what, "add bos_token and eos_token to its tokenizer_config.json")
