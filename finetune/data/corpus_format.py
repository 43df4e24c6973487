"""What a corpus folder holds: its files, and the manifest that describes them.

    manifest.json   what it was made from and by which tokenizer, the counts, and each file's length and SHA-256
    tokens.bin      ids of all documents one after the other: uint16, or uint32 for more than 65 536 tokens
    trained.bin     uint8, one for each token: 1 where there is loss on it
    documents.bin   int64, one more than documents: where each begins in tokens.bin
    turns.bin       int64, one more than documents: where each begins in places.bin
    places.bin      two int32 for each turn: where its prompt and its reply begin within the document
    sources.bin     uint16, one for each document: an index into the manifest's sources
    held_out.bin    uint8, one for each document: 1 where it is never trained on

Numbers are little-endian. What precedes a document's first prompt is its header. A plain text is
one turn whose prompt is empty; its header is BOS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koala_local.errors import KoalaError
from koala_local.models.json_file import parse_object

VERSION = 1
MANIFEST = "manifest.json"
FILES = ("tokens", "trained", "documents", "turns", "places", "sources", "held_out")
TYPES = {"trained": "u1", "documents": "<i8", "turns": "<i8", "places": "<i4", "sources": "<u2", "held_out": "u1"}
MOST_SOURCES, _LARGEST_VOCABULARY = 1 << 16, 1 << 31
REBUILD = "build the corpus again: koala data build"


class CorpusError(KoalaError):
    """A corpus that is missing, damaged, made for another model, or cannot be written."""


def token_type(vocabulary_size: int) -> str:
    """The type of tokens.bin."""
    return "<u2" if vocabulary_size <= 1 << 16 else "<u4"


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one source. The tokens are those that training sees: none of what is held out."""

    documents: int = 0
    held_out: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a corpus says of itself."""

    tokenizer_key: str
    vocabulary_size: int  # tokens of the tokenizer: every id is below
    format: str  # the prompt format's key
    inputs: Mapping[str, str]  # the SHA-256 of each file it was made from, by name
    recipe: Mapping[str, Any]
    sources: Mapping[str, Counts]  # in the order of their indices
    files: Mapping[str, tuple[int, str]]  # length in bytes and SHA-256
    key: str = ""  # SHA-256 of manifest.json: equal for equal corpora

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.sources.values())

    @property
    def trained_tokens(self) -> int:
        return sum(counts.trained_tokens for counts in self.sources.values())

    def to_json(self) -> str:
        """The manifest.json of this manifest."""
        counts = {name: asdict(counts) for name, counts in self.sources.items()}
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        tree = {
            "version": VERSION,
            "tokenizer_key": self.tokenizer_key,
            "vocabulary_size": self.vocabulary_size,
            "format": self.format,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "sources": counts,
            "inputs": dict(self.inputs),
            "recipe": dict(self.recipe),
            "files": files,
        }
        return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest in `text`, the content of `path`. Raises CorpusError, or ModelFileError where it is no JSON."""
    tree = parse_object(text, repr(str(path)))
    if tree.get("version") != VERSION:
        what = f"{str(path)!r} is of version {str(tree.get('version'))[:20]!r}, known is {VERSION}"
        raise CorpusError(what, REBUILD)
    try:
        return Manifest(
            _text(tree["tokenizer_key"]),
            _number(tree["vocabulary_size"], 1, _LARGEST_VOCABULARY),
            _text(tree["format"]),
            {_text(name): _text(digest) for name, digest in tree["inputs"].items()},
            dict(tree["recipe"]),
            {_text(name): _counts(each) for name, each in tree["sources"].items()},
            {name: (_number(tree["files"][name]["bytes"]), _text(tree["files"][name]["sha256"])) for name in FILES},
            hashlib.sha256(text).hexdigest(),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorpusError(f"{str(path)!r} is not what a corpus has: {str(error)[:80]}", REBUILD) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value


def _number(value: Any, least: int = 0, most: int = 1 << 62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is not a number from {least} to {most}")
    return value


def _counts(tree: Any) -> Counts:
    return Counts(*(_number(tree[name]) for name in Counts.__dataclass_fields__))
