"""The tokenizer of a Hugging Face folder as an engine needs it: plain text to ids, ids to bytes, the special tokens.

`tokenizer.model` is read by sentencepiece, else `tokenizer.json` by tokenizers. In neither is a special token parsed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_local.engine.base import Vocabulary
from koala_local.errors import ModelFileError
from koala_local.models.json_file import read_optional

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_GUARD = "\x01"  # a control character merges with nothing: what follows it is tokenized as inside a text
_NORMAL, _CONTROL, _USER_DEFINED, _UNKNOWN, _BYTE_TOKEN, _UNUSED = range(6)
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>")
_LONGEST_FILE = 128 << 20
_MOST_TOKENS = 280_000  # of any vocabulary; the largest have 262 145
_CROSSING = re.compile(r"[^ \n][ \n]")
_CHANGED = "a\ufb01\u2460  e\u0301\x1c \n b \n"  # by every normalizer that sentencepiece has


@dataclass(frozen=True, slots=True)
class Expected:
    """What a model's configuration says of its vocabulary: its size, and ids that the tokenizer may overrule."""

    vocabulary: int | None  # None: as many tokens as the tokenizer has
    bos: int | None
    eos: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    kind: int
    piece: bytes


class GptqTokenizer:
    """A tokenizer and its vocabulary of `size` tokens, as many as the model has rows. `apart`: a text may be cut in
    front of spaces and line ends, and its parts tokenized one by one."""

    def __init__(self, folder: Path, expected: Expected) -> None:
        """Raises ModelFileError when there is no tokenizer, or one of another model."""
        if (folder / "tokenizer.model").is_file():
            self._encode, tokens, special, self.apart = _sentencepiece(folder / "tokenizer.model")
        elif (folder / "tokenizer.json").is_file():
            self._encode, tokens, special, self.apart = _tokenizer_json(folder / "tokenizer.json")
        else:
            raise ModelFileError(f"{str(folder)!r} has no tokenizer.model and no tokenizer.json", "download them")
        _add_tokens(folder, tokens)
        most = _MOST_TOKENS if expected.vocabulary is None else expected.vocabulary
        tokens = {id_: token for id_, token in tokens.items() if id_ < most}
        size = 1 + max(tokens, default=0) if expected.vocabulary is None else expected.vocabulary
        self.pieces = [tokens[id_].piece if id_ in tokens else b"" for id_ in range(size)]
        first = self._encode("x")
        adds_space = bool(first) and self.pieces[first[0]].startswith(b" ")
        self.vocabulary = _vocabulary(folder, size, expected, tokens, special, adds_space)
        self._guard = self._encode(_GUARD)

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """As `Engine.tokenize`."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
        if continues and self.vocabulary.adds_space:
            guard, ids = self._guard, self._encode(_GUARD + text)
            return ids[len(guard) :] if ids[: len(guard)] == guard else self._encode(text)
        return self._encode(text)


_Read = tuple[Callable[[str], list[int]], dict[int, _Token], dict[str, int], bool]


def _sentencepiece(path: Path) -> _Read:
    """The encoder, the tokens, the ids that the file itself gives to bos, eos and unk, and whether words may be
    tokenized apart: a byte-pair encoding (its scores are ranks) of text as it is, every byte of it, where no token
    crosses from one word into the space behind it."""
    import sentencepiece

    try:
        model: Any = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() or b"\0")
        size = model.get_piece_size()
    except (OSError, RuntimeError, TypeError) as error:
        raise ModelFileError(
            f"{path.name} is no SentencePiece model: {str(error)[:100]}", "download it again"
        ) from None
    tokens = {}
    for id_ in range(size):
        text = model.id_to_piece(id_)
        if model.is_unknown(id_):
            tokens[id_] = _Token(text, _UNKNOWN, b"")
        elif model.is_control(id_):
            tokens[id_] = _Token(text, _CONTROL, b"")
        elif model.is_byte(id_):
            tokens[id_] = _Token(text, _BYTE_TOKEN, bytes([int(text[3:5], 16)]))
        else:
            tokens[id_] = _Token(text, _UNUSED if model.is_unused(id_) else _NORMAL, _spaced(text))
    special = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}

    def encode(text: str) -> list[int]:
        found: list[int] = model.encode(text)
        return found

    ranks = all(model.get_score(id_).is_integer() for id_ in range(size))
    as_it_is = model.normalize(_CHANGED).lstrip(_SPACE) == _CHANGED.replace(" ", _SPACE)
    crossing = any(_CROSSING.search(token.text.replace(_SPACE, " ")) for token in tokens.values())
    whole = sum(token.kind == _BYTE_TOKEN for token in tokens.values()) == 256  # unknown ones in a row become one
    apart = ranks and as_it_is and whole and not crossing
    return encode, tokens, {key: id_ for key, id_ in special.items() if id_ >= 0}, apart


def _spaced(text: str) -> bytes:
    return text.replace(_SPACE, " ").encode("utf-8", "replace")


def _tokenizer_json(path: Path) -> _Read:
    from tokenizers import Tokenizer

    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise ValueError("it is too large")
        model = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFileError(f"{path.name} is no tokenizer: {str(error)[:100]}", "download it again") from None
    model.encode_special_tokens = True  # as text: nothing that a user writes becomes a special token
    model.no_padding()
    model.no_truncation()
    spell = _byte_level if '"ByteLevel"' in json.dumps(read_optional(path).get("decoder")) else _spaced_or_byte
    added = model.get_added_tokens_decoder()
    unknown = getattr(model.model, "unk_token", None)
    tokens = {}
    for text, id_ in model.get_vocab(with_added_tokens=False).items():
        kind = _UNKNOWN if text == unknown else _NORMAL
        tokens[id_] = _Token(text, kind, b"" if text == unknown else spell(text))
    for id_, token in added.items():
        if token.content != unknown:
            kind = _CONTROL if token.special else _USER_DEFINED
            tokens[id_] = _Token(token.content, kind, b"" if token.special else token.content.encode())

    def encode(text: str) -> list[int]:
        found: list[int] = model.encode(text, add_special_tokens=False).ids
        return found

    by_text = {token.text: id_ for id_, token in tokens.items()}
    named = {"bos": "<s>", "eos": "</s>", "unk": unknown}
    return encode, tokens, {key: by_text[text] for key, text in named.items() if text in by_text}, False


def _spaced_or_byte(text: str) -> bytes:
    match = _BYTE.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else _spaced(text)


def _byte_level(text: str) -> bytes:
    """GPT-2's alphabet: every byte has a printable character."""
    return bytes(_ALPHABET[c] if c in _ALPHABET else ord("?") for c in text)


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _add_tokens(folder: Path, tokens: dict[int, _Token]) -> None:
    """Tokens that tokenizer_config.json and added_tokens.json add. They are control tokens here, special or not: with
    neither library are those outside the tokenizer's own file matched in a text."""
    decoder = read_optional(folder / "tokenizer_config.json").get("added_tokens_decoder")
    found: list[tuple[Any, Any]] = [(id_, text) for text, id_ in read_optional(folder / "added_tokens.json").items()]
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        found.append((int(key) if key.isdecimal() else key, entry.get("content") if isinstance(entry, dict) else None))
    for id_, text in found:
        if type(id_) is not int or id_ < 0 or not isinstance(text, str):
            raise ModelFileError(
                f"an added token is malformed: {str(text)[:80]!r} as {str(id_)[:40]!r}", "mend the file"
            )
        if id_ not in tokens:
            tokens[id_] = _Token(text, _CONTROL, b"")


def _vocabulary(
    folder: Path,
    size: int,
    expected: Expected,
    tokens: Mapping[int, _Token],
    special: Mapping[str, int],
    adds_space: bool,
) -> Vocabulary:
    digest = hashlib.sha256()
    for id_ in range(size):
        token = tokens.get(id_, _Token("", _UNUSED, b""))
        text = token.text.encode("utf-8", "replace")
        digest.update(b"%d %d " % (token.kind, len(text)) + text)
    by_kind: dict[int, dict[str, int]] = {kind: {} for kind in range(6)}
    for id_, token in tokens.items():
        by_kind[token.kind][token.text] = id_
    control = by_kind[_CONTROL] | by_kind[_UNKNOWN]
    written = read_optional(folder / "tokenizer_config.json")
    bos = _special(written, "bos_token", control, special.get("bos", expected.bos))
    eos = _special(written, "eos_token", control, special.get("eos", next(iter(expected.eos), None)))
    add_bos = written.get("add_bos_token", True)
    # What config.json calls an end counts where it is a control token: LLaMA's early ones named a wrong one.
    ends = {id_ for id_ in expected.eos if id_ in control.values() and id_ not in (bos, special.get("unk"))}
    ends |= {control[text] for text in _TURN_ENDS if text in control} | ({eos} if eos is not None else set())
    return Vocabulary(
        key=digest.hexdigest(),
        size=size,
        bos=bos,
        eos=eos,
        add_bos=bos is not None and add_bos is not False,
        adds_space=adds_space,
        control=control,
        user_defined=by_kind[_USER_DEFINED],
        unknown=special.get("unk"),
        ends=frozenset(ends),
        longest=max((len(token.piece) for token in tokens.values()), default=1) or 1,
    )


def _special(written: Mapping[str, Any], key: str, control: Mapping[str, int], default: int | None) -> int | None:
    """The token that tokenizer_config.json names as a string or an object, else the default."""
    value = written.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    return control[text] if isinstance(text, str) and text in control else default
