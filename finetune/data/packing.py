"""The pack plan: which documents share a row, for all epochs, decided before anything is given to a rank; and the
batches that a training step eats.

Best-fit decreasing: the longest piece first, each into the row that it leaves the least room in. The plan is a function
of the corpus, the sequence length, the epochs, the seed and the weights; step k is a function of the plan alone. So all
that a resumed run needs is its step, and the number of ranks may change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from koala_local.errors import KoalaError

from .corpus import Corpus
from .pieces import Pieces, cut

LossNorm = Literal["token", "sequence"]

SHORTEST_SEQUENCE = 16
_DRAW, _MIX, _ORDER = range(3)  # what a random generator is for


class PackingError(KoalaError):
    """A plan that cannot be made, or has no such step."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of `length` tokens; all arrays are (rows, length). The place behind the last document is padding."""

    ids: NDArray[np.int64]  # token ids; 0 in padding
    targets: NDArray[np.int64]  # the token that follows in the same document; 0 where the weight is 0
    weights: NDArray[np.float32]  # of each target; 0: not trained. A step's loss is sum(weight x loss) / sum(weight)
    positions: NDArray[np.int64]  # counted from each document's first token
    documents: NDArray[np.int32]  # number of the document within its row, from 0; padding is -1

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.documents >= 0).sum())

    def without_targets(self) -> Batch:
        """As many rows, all padding: for a rank that has none and must take part."""
        return replace(self, weights=np.zeros_like(self.weights), documents=np.full_like(self.documents, -1))


@dataclass(frozen=True, slots=True)
class Share:
    """Of one source in the plan, over all epochs. `tokens` include header and context that are repeated."""

    documents: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Rows of pieces. Row r holds the pieces contents[offsets[r]:offsets[r + 1]]."""

    corpus: Corpus
    sequence_length: int
    pieces: Pieces
    contents: NDArray[np.int64]
    offsets: NDArray[np.int64]
    trained_counts: NDArray[np.int64]  # trained tokens of each document of the corpus
    tokens: int  # that are no padding, over all rows
    trained_tokens: int
    sources: Mapping[str, Share]
    key: str  # SHA-256: equal for equal rows of an equal corpus

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """The share of the rows' places that is no padding."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0

    @property
    def cuts(self) -> str:
        """What becomes of dialogues that are longer than a row, each counted once; empty where there is none."""
        pieces = self.pieces
        if not pieces.split_documents:
            return ""
        told = [f"{pieces.split_documents:,} dialogues longer than a row, between turns"]
        if pieces.windowed_turns:
            told.append(f"{pieces.windowed_turns:,} turns longer than a row, in windows")
        if pieces.cut_headers:
            told.append(f"{pieces.cut_headers:,} without their long system text")
        told.append(f"{pieces.repeated_tokens:,} tokens repeated as context")
        if pieces.unseen_tokens:
            told.append(f"{pieces.unseen_tokens:,} tokens of long prompts and system texts left out")
        return "; ".join(told)

    def steps(self, global_batch: int) -> int:
        """Steps of `global_batch` rows; the last one may have fewer."""
        return -(-self.rows // global_batch)

    def step_rows(self, step: int, global_batch: int) -> NDArray[np.int64]:
        """The rows of a step, counted from 0. Raises PackingError behind the last."""
        if global_batch < 1 or not 0 <= step < self.steps(global_batch):
            what = f"there is no step {step}: the plan has {self.steps(max(global_batch, 1))} of {global_batch} rows"
            raise PackingError(what, "train for fewer steps, or for more epochs")
        return np.arange(step * global_batch, min((step + 1) * global_batch, self.rows))

    def batch(self, rows: Sequence[int] | NDArray[np.int64], loss_norm: LossNorm = "token") -> Batch:
        """The rows as a training step eats them. A target's weight is 1, or with "sequence" one part of the trained
        tokens of its dialogue, so that every dialogue weighs 1, over all its pieces if it was cut."""
        shape = (len(rows), self.sequence_length)
        ids, targets, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        weights, documents = np.zeros(shape, dtype=np.float32), np.full(shape, -1, dtype=np.int32)
        for place, row in enumerate(rows):
            at = 0
            for number, piece in enumerate(self.contents[self.offsets[row] : self.offsets[row + 1]].tolist()):
                tokens, trained, weight = self._piece(piece)
                here, last = slice(at, at + len(tokens)), at + len(tokens) - 1
                ids[place, here] = tokens
                positions[place, here] = np.arange(len(tokens))
                documents[place, here] = number
                targets[place, at:last] = tokens[1:] * trained[1:]
                weights[place, at:last] = trained[1:] * (1.0 if loss_norm == "token" else weight)
                at = last + 1
        return Batch(ids, targets, weights, positions, documents)

    def _piece(self, piece: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], float]:
        """Its ids, which of them are trained, and the weight of each in its dialogue."""
        pieces = self.pieces
        document, header, context = (int(a[piece]) for a in (pieces.document, pieces.header, pieces.context))
        ids, trained = self.corpus.document(document)
        span = slice(context, int(pieces.end[piece]))
        mask = trained[span].copy()
        mask[: int(pieces.start[piece]) - context] = 0
        tokens = np.concatenate([ids[:header], ids[span]]).astype(np.int64)
        weight = 1.0 / max(int(self.trained_counts[document]), 1)
        return tokens, np.concatenate([np.zeros(header, dtype=np.uint8), mask]), weight


def make_plan(
    corpus: Corpus,
    sequence_length: int,
    *,
    epochs: float = 1.0,
    seed: int = 42,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> PackPlan:
    """The plan for all that is not held out. `weights`: times per epoch of a source's documents, 1 unless named. What
    is a fraction is drawn; over the epochs every document has its turn before any is drawn again.

    Raises PackingError: numbers that make no plan, a source that there is not, a corpus with nothing to train on."""
    _check(corpus, sequence_length, epochs, weights)
    draws = [_draws(corpus, index, name, epochs, seed, weights) for index, name in enumerate(corpus.source_names)]
    taken = [np.concatenate(of_epoch) for of_epoch in zip(*draws, strict=True)]
    used = np.unique(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)
    if not len(used):
        raise PackingError("there is nothing to train on", "look at the corpus with koala data report, and at weights")
    pieces = cut(corpus, used, sequence_length)
    packed = [_pack(pieces, documents, sequence_length, (seed, epoch)) for epoch, documents in enumerate(taken)]
    return _plan(corpus, sequence_length, pieces, packed)


def held_out_rows(corpus: Corpus, source: str, sequence_length: int) -> PackPlan:
    """The plan of a source's held-out documents, each once. It may have no row.
    Raises PackingError when there is no such source."""
    _check(corpus, sequence_length, 1.0, {source: 1.0})
    of_source = corpus.sources == corpus.source_names.index(source)
    documents = np.flatnonzero(of_source & corpus.held_out)
    pieces = cut(corpus, documents, sequence_length)
    return _plan(corpus, sequence_length, pieces, [_pack(pieces, documents, sequence_length, (0, 0))])


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """The row of each length, and how many rows there are. Each goes to the row with the least room that still takes
    it, in the order given: falling lengths fill best. No length is above `capacity`."""
    rows: list[int] = []
    count = 0
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has room for exactly r more
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, count = capacity, count, count + 1
        rows.append(row)
        if rest := room - length:
            by_room[rest].append(row)
            rooms |= 1 << rest
    return rows, count


def _check(corpus: Corpus, sequence_length: int, epochs: float, weights: Mapping[str, float]) -> None:
    if sequence_length < SHORTEST_SEQUENCE:
        raise PackingError(f"a sequence of {sequence_length} tokens is too short", "take 2048")
    if not 0 < epochs < math.inf:
        raise PackingError(f"{epochs} epochs cannot be", "take a number above 0")
    for name, weight in weights.items():
        if name not in corpus.source_names:
            what = f"there is no source {name!r} in the corpus"
            raise PackingError(what, f"its sources are {', '.join(corpus.source_names)}")
        if not 0 <= weight < math.inf:
            raise PackingError(f"the weight of {name} cannot be {weight}", "take a number from 0 up")


def _draws(
    corpus: Corpus, index: int, name: str, epochs: float, seed: int, weights: Mapping[str, float]
) -> list[NDArray[np.int64]]:
    """The documents of a source in each epoch. They are taken from one shuffled circle, on from where the last epoch
    ended."""
    documents = np.flatnonzero((corpus.sources == index) & ~corpus.held_out)
    circle = np.random.default_rng([_DRAW, seed, index]).permutation(documents)
    marks = [*range(math.ceil(epochs)), epochs]
    ends = [math.floor(weights.get(name, 1.0) * mark * len(circle) + 0.5) for mark in marks]
    return [circle[np.arange(start, end) % max(len(circle), 1)] for start, end in pairwise(ends)]


def _pack(
    pieces: Pieces, documents: NDArray[np.int64], capacity: int, seed: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pieces of these documents in rows, shuffled: (pieces, how many in each row)."""
    first, after = (np.searchsorted(pieces.document, documents, side) for side in ("left", "right"))
    counts = after - first
    # Piece numbers first[i] .. after[i] - 1 of each document, one after the other.
    chosen = np.repeat(first - (counts.cumsum() - counts), counts) + np.arange(int(counts.sum()))
    chosen = np.random.default_rng([_MIX, *seed]).permutation(chosen)
    chosen = chosen[np.argsort(-pieces.lengths[chosen], kind="stable")]
    rows, count = best_fit(pieces.lengths[chosen].tolist(), capacity)
    places = np.random.default_rng([_ORDER, *seed]).permutation(count)[np.array(rows, dtype=np.int64)]
    return chosen[np.argsort(places, kind="stable")], np.bincount(places, minlength=count)


def _plan(
    corpus: Corpus,
    sequence_length: int,
    pieces: Pieces,
    packed: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> PackPlan:
    contents = np.concatenate([of_epoch for of_epoch, _ in packed])
    offsets = np.concatenate([[0], *(counts for _, counts in packed)]).cumsum()
    lengths = pieces.lengths
    whole = corpus.trained_counts
    trained = _trained(corpus, pieces, whole)
    first = np.diff(pieces.document, prepend=-1) > 0  # piece of its document
    digest = hashlib.sha256(f"{corpus.key} {sequence_length}".encode())
    for array in (contents, offsets, pieces.document, pieces.header, pieces.context, pieces.start, pieces.end):
        digest.update(array.astype("<i8").tobytes())
    source = corpus.sources[pieces.document[contents]]
    size = len(corpus.source_names)
    tally = [
        np.bincount(source, weights=of_piece[contents], minlength=size).astype(np.int64).tolist()
        for of_piece in (first, lengths, trained)
    ]
    return PackPlan(
        corpus,
        sequence_length,
        pieces,
        contents,
        offsets,
        whole,
        int(lengths[contents].sum()),
        int(trained[contents].sum()),
        {name: Share(*(each[index] for each in tally)) for index, name in enumerate(corpus.source_names)},
        digest.hexdigest(),
    )


def _trained(corpus: Corpus, pieces: Pieces, whole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Trained tokens of each piece."""
    counts = whole[pieces.document]
    cut_up = np.flatnonzero((pieces.start > pieces.header) | (pieces.end < corpus.lengths[pieces.document]))
    for piece in cut_up.tolist():
        _, trained = corpus.document(int(pieces.document[piece]))
        counts[piece] = int(trained[pieces.start[piece] : pieces.end[piece]].sum())
    return counts
