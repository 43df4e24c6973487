"""A corpus on disk: its files, and the manifest that describes them. Reading maps them and trusts none of them.

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
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.json_file import parse_object

VERSION = 1
MANIFEST = "manifest.json"
FILES = ("tokens", "trained", "documents", "turns", "places", "sources", "held_out")
TYPES = {"trained": "u1", "documents": "<i8", "turns": "<i8", "places": "<i4", "sources": "<u2", "held_out": "u1"}
MOST_SOURCES, _LARGEST_VOCABULARY = 1 << 16, 1 << 31
REBUILD = "build the corpus again: koala data build"
_LARGEST_MANIFEST = 128 << 20
_BLOCK = 8 << 20


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


@dataclass(frozen=True, slots=True)
class Corpus:
    """An open corpus. The arrays are those of the files, mapped."""

    folder: Path
    manifest: Manifest
    tokens: NDArray[Any]
    trained: NDArray[np.uint8]
    documents: NDArray[np.int64]
    turns: NDArray[np.int64]
    places: NDArray[np.int32]  # (turns, 2): prompt, reply
    sources: NDArray[np.uint16]
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.sources)

    @property
    def key(self) -> str:
        """Equal for corpora of equal content."""
        return self.manifest.key

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(self.manifest.sources)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        lengths: NDArray[np.int64] = self.documents[1:] - self.documents[:-1]
        return lengths

    @property
    def trained_counts(self) -> NDArray[np.int64]:
        """Trained tokens of each document."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        counts: NDArray[np.int64] = np.add.reduceat(self.trained, self.documents[:-1], dtype=np.int64)
        return counts

    @property
    def headers(self) -> NDArray[np.int64]:
        """Tokens before the first prompt of each document."""
        headers: NDArray[np.int64] = self.places[self.turns[:-1], 0].astype(np.int64)
        return headers

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """The ids of a document, and what of it is trained on."""
        start, end = self.documents[index : index + 2]
        return self.tokens[start:end], self.trained[start:end]

    def turns_of(self, index: int) -> NDArray[np.int32]:
        """Where the prompt and the reply of each turn begin within the document: (turns, 2)."""
        return self.places[self.turns[index] : self.turns[index + 1]]


def open_corpus(folder: Path, tokenizer_key: str | None = None) -> Corpus:
    """The corpus in the folder. Every file is read once, to check it against the manifest and its own bounds.

    Raises CorpusError: no corpus, a damaged one, or one made with a tokenizer of another key."""
    manifest = read_manifest(folder)
    if tokenizer_key is not None and manifest.tokenizer_key != tokenizer_key:
        what = f"the corpus {str(folder)!r} was built with another tokenizer than the model's"
        raise CorpusError(what, "build it again with the tokenizer of the base: koala data build")
    types = TYPES | {"tokens": token_type(manifest.vocabulary_size)}
    try:
        arrays = {name: _map(folder, name, types[name], manifest) for name in FILES}
    except OSError as error:
        raise _unreadable(folder, error) from None
    arrays["places"] = arrays["places"].reshape(-1, 2)
    arrays["held_out"] = arrays["held_out"].view(np.bool_)
    corpus = Corpus(folder, manifest, **arrays)
    _check_counts(corpus)
    return corpus


def read_manifest(folder: Path) -> Manifest:
    """That of the corpus in the folder, whose other files are not looked at. Raises CorpusError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CorpusError(f"there is no corpus in {str(folder)!r}: it has no {MANIFEST}", "koala data build makes one")
    try:
        with path.open("rb") as file:
            return parse_manifest(file.read(_LARGEST_MANIFEST), path)
    except OSError as error:
        raise _unreadable(folder, error) from None
    except ModelFileError as error:
        raise CorpusError(error.message, REBUILD) from None


def _unreadable(folder: Path, error: OSError) -> CorpusError:
    return CorpusError(f"{str(folder)!r} cannot be read: {error.strerror}", "check the folder")


def _map(folder: Path, name: str, kind: str, manifest: Manifest) -> NDArray[Any]:
    """The file as an array; its length and hash are right."""
    path = folder / f"{name}.bin"
    size, digest = manifest.files[name]
    length = path.stat().st_size if path.is_file() else -1
    item = np.dtype(kind).itemsize * (2 if name == "places" else 1)
    if length != size or size % item:
        what = "is missing" if length < 0 else f"has {length} bytes, its manifest says {size}"
        raise CorpusError(f"{str(path)!r} {what}", REBUILD)
    if size == 0:
        return np.empty(0, kind)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        found.update(memoryview(mapped)[start : start + _BLOCK])
    if found.hexdigest() != digest:
        raise CorpusError(f"{str(path)!r} is damaged: its SHA-256 is not that of its manifest", REBUILD)
    return np.frombuffer(mapped, kind)


def _check_counts(corpus: Corpus) -> None:
    """Whether every number in the files leads to a place that there is. Raises CorpusError."""
    count, names = len(corpus), len(corpus.manifest.sources)
    checks = {
        "documents": _rises(corpus.documents, count, len(corpus.tokens)),
        "turns": _rises(corpus.turns, count, len(corpus.places)),
        "trained": len(corpus.trained) == len(corpus.tokens) and _below(corpus.trained, 2),
        "tokens": _below(corpus.tokens, corpus.manifest.vocabulary_size),
        "sources": _below(corpus.sources, names),
        "held_out": len(corpus.held_out) == count and _below(corpus.held_out.view(np.uint8), 2),
    }
    checks["places"] = checks["documents"] and checks["turns"] and _places_fit(corpus)
    for name, right in checks.items():
        if not right:
            raise CorpusError(f"{corpus.folder / name!s}.bin holds numbers that cannot be", REBUILD)


def _rises(offsets: NDArray[np.int64], count: int, end: int) -> bool:
    """Whether `count` spans, none of them empty, cover 0 to `end`."""
    whole = len(offsets) == count + 1 and int(offsets[0]) == 0 and int(offsets[-1]) == end
    return whole and bool((offsets[1:] > offsets[:-1]).all())


def _below(numbers: NDArray[Any], limit: int) -> bool:
    step = _BLOCK
    return all(int(numbers[start : start + step].max()) < limit for start in range(0, len(numbers), step))


def _places_fit(corpus: Corpus) -> bool:
    """prompt 0 <= reply 0 < prompt 1 <= reply 1 .. < length: a prompt may be empty, a reply has an end token. Nothing
    is trained on as the first token of its document."""
    prompts, replies = corpus.places[:, 0], corpus.places[:, 1]
    last = corpus.turns[1:] - 1
    ends = np.empty(len(prompts), dtype=np.int64)
    ends[:-1] = prompts[1:]
    ends[last] = corpus.lengths
    return bool(((prompts >= 0) & (prompts <= replies) & (replies > 0) & (replies < ends)).all())
