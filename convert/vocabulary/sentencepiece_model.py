"""What a SentencePiece `tokenizer.model` says: its pieces, special ids and text preparation.

The file is a protocol buffer (sentencepiece_model.proto). The few fields that matter are read here, bounds-checked: the
sentencepiece package shows no model type and no normalizer, and its own message classes need the protobuf package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from koala_local.errors import ModelFileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers as in GGUF
BPE = 2
_UNIGRAM = 1
_NO_ID = -1
_Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """Pieces in id order as (text, score, type), special ids (-1: none) and how text is prepared."""

    pieces: list[tuple[bytes, float, int]]
    model_type: int
    unk: int
    bos: int
    eos: int
    pad: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    has_character_map: bool


def parse_sentencepiece(content: bytes) -> SentencePieceModel:
    """Parse the file's bytes. Raises ModelFileError when they are no SentencePiece model."""
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _fields(content):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (ValueError, struct.error) as error:
        raise ModelFileError(f"not a SentencePiece model: {error}", "fetch tokenizer.model again") from None
    if not pieces:
        raise ModelFileError("not a SentencePiece model: it has no pieces", "fetch tokenizer.model again")
    return SentencePieceModel(
        pieces,
        model_type=_number(trainer, 3, _UNIGRAM),
        unk=_number(trainer, 40, 0),
        bos=_number(trainer, 41, 1),
        eos=_number(trainer, 42, 2),
        pad=_number(trainer, 43, _NO_ID),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        has_character_map=bool(normalizer.get(2)),
    )


def _piece(content: bytes) -> tuple[bytes, float, int]:
    fields = dict(_fields(content))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece is malformed")
    type_ = _number(fields, 3, NORMAL)
    if type_ not in range(NORMAL, BYTE + 1):
        raise ValueError(f"a piece has the type {type_}")
    return text, struct.unpack("<f", score)[0], type_


def _number(fields: dict[int, int | bytes], field: int, default: int) -> int:
    value = fields.get(field, default)
    if not isinstance(value, int):
        raise ModelFileError("not a SentencePiece model: a number is malformed", "fetch tokenizer.model again")
    return value - 2**64 if value >= 2**63 else value


def _fields(content: bytes) -> Iterator[_Field]:
    """(field number, value) in file order: an int for varints, bytes for all else. Raises ValueError at damage."""
    position = 0
    while position < len(content):
        tag, position = _varint(content, position)
        kind = tag & 7
        if kind == 0:
            number, position = _varint(content, position)
            yield tag >> 3, number
            continue
        if kind == 2:
            size, position = _varint(content, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if size > len(content) - position:
            raise ValueError(f"a field at byte {position} ends beyond the file")
        yield tag >> 3, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number is cut or too long at byte {position}")
