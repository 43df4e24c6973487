"""Queries that were asked before, word for word or nearly so.

A query is all that the user says in a dialogue, without case and punctuation; a plain text is compared as a whole, and
only with others of its kind. Two are near duplicates where at least
`THRESHOLD` of their 3-word shingles, of all that either has, are in both (Jaccard similarity). MinHash and its index
(datasketch) propose pairs, the shingles themselves decide: what is reported is never an estimate. Of pairs at exactly
the threshold the index misses about one in seventy, of pairs at 0.9 one in 100,000.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasketch import MinHash

THRESHOLD = 0.8
SHINGLE = 3  # words
_PERMUTATIONS = 128
_BANDS, _ROWS = 18, 7
_WORD = re.compile(r"\w+")

Strictness = Literal["keep", "exact", "near"]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What of a query is remembered. Without shingles it is compared by its digest only."""

    digest: bytes
    shingles: NDArray[np.uint32]  # sorted, each once
    signature: NDArray[np.uint32]


def fingerprint(query: str, *, near: bool, kind: Literal["query", "text"] = "query") -> Fingerprint:
    """Of one query; `near` says whether near duplicates will be looked for. What is of another kind is no duplicate."""
    words = _WORD.findall(query.casefold())
    said = (" ".join(words) or query.strip()).encode("utf-8", "surrogatepass")
    digest = blake2b(said, digest_size=16, person=kind.encode()).digest()
    if not near or len(words) < SHINGLE:
        return Fingerprint(digest, np.empty(0, np.uint32), np.empty(0, np.uint32))
    runs = zip(*(words[start:] for start in range(SHINGLE)), strict=False)
    shingles = np.unique(np.array([crc32(" ".join(run).encode("utf-8", "surrogatepass")) for run in runs], np.uint32))
    return Fingerprint(digest, shingles, _min_hash(shingles).hashvalues)


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """The share of the shingles of both that are in each."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)


@dataclass(slots=True)
class Seen:
    """The queries so far. What is a duplicate depends on their order: the first one stays."""

    _digests: set[bytes] = field(default_factory=set)
    _index: Any = None  # datasketch.MinHashLSH, once there is something to look for
    _shingles: list[NDArray[np.uint32]] = field(default_factory=list)

    def add(self, query: Fingerprint) -> Literal["", "exact", "near"]:
        """Whether the query repeats an earlier one; a new one is remembered."""
        if query.digest in self._digests:
            return "exact"
        self._digests.add(query.digest)
        if not len(query.shingles):
            return ""
        signature = _stored(query.signature)
        if self._index is None:
            self._index = _new_index()
        if self._is_near(query.shingles, self._index.query(signature)):
            return "near"
        self._index.insert(len(self._shingles), signature, check_duplication=False)
        self._shingles.append(query.shingles)
        return ""

    def _is_near(self, shingles: NDArray[np.uint32], candidates: Sequence[int]) -> bool:
        return any(jaccard(shingles, self._shingles[candidate]) >= THRESHOLD for candidate in candidates)


def _new_index() -> Any:
    from datasketch import MinHashLSH  # takes a second to import

    return MinHashLSH(num_perm=_PERMUTATIONS, params=(_BANDS, _ROWS))


@cache
def _empty() -> MinHash:
    from datasketch import MinHash

    return MinHash(_PERMUTATIONS, hashfunc=int)


def _min_hash(shingles: NDArray[np.uint32]) -> MinHash:
    made = _empty().copy()
    made.update_batch(shingles.tolist())
    return made


def _stored(signature: NDArray[np.uint32]) -> MinHash:
    empty = _empty()
    return type(empty)(hashvalues=signature, permutations=empty.permutations, scheme=empty.scheme)
