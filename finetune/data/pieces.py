"""How documents that are longer than a sequence are cut: at turns, each part with the header and what went before.
A plain text is one turn, so it is cut as a turn is that is longer than a sequence: in windows that share some context.

A piece is the document's header, then earlier tokens as context, then the tokens that are trained in this piece. Every
token with loss is trained in exactly one piece of its document. What of a prompt has no room beside its reply is in no
piece, and is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .corpus import Corpus

_Span = tuple[int, int, int]  # where the context begins, where training does, where both end
_CONTEXT = 4  # one part in so many of a later piece is kept for what went before
_LONGEST_HEADER = 2  # one part in so many of a sequence: a longer header stays away from what was cut


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces in the order of their documents. All arrays have one number for each piece; the places are within the
    document: tokens [0, header), then [context, end), trained from `start` on."""

    document: NDArray[np.int64]
    header: NDArray[np.int64]
    context: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    split_documents: int = 0  # at turns, into several pieces
    windowed_turns: int = 0  # a turn that is longer than the sequence, cut in its midst
    cut_headers: int = 0  # documents whose system text is too long to stand before each part
    repeated_tokens: int = 0  # of header and context, beyond the first time that a document's pieces have them
    unseen_tokens: int = 0  # of prompts and system texts, in no piece

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.header + self.end - self.context


def cut(corpus: Corpus, documents: NDArray[np.int64], sequence_length: int) -> Pieces:
    """The pieces of these documents, none longer than a sequence. `documents` rise."""
    lengths, headers = corpus.lengths[documents], corpus.headers[documents]
    fits = lengths <= sequence_length
    whole = np.stack([documents, headers, headers, headers, lengths], axis=1)[fits]
    rows: list[tuple[int, int, int, int, int]] = []
    windowed = cut_headers = repeated = unseen = 0
    for document, header, length in zip(*(a[~fits].tolist() for a in (documents, headers, lengths)), strict=True):
        kept = header if header * _LONGEST_HEADER <= sequence_length else 1
        places = corpus.turns_of(document).tolist()
        room = sequence_length - kept
        spans = list(_split([prompt for prompt, _ in places], [reply for _, reply in places], length, room))
        rows += [(document, kept, *span) for span in spans]
        seen = kept + _covered(spans)
        repeated += sum(kept + end - context for context, _, end in spans) - seen
        unseen += length - seen
        ends = [*(prompt for prompt, _ in places[1:]), length]
        windowed += sum(end - prompt > room for (prompt, _), end in zip(places, ends, strict=True))
        cut_headers += kept != header
    table = np.concatenate([whole, np.array(rows, dtype=np.int64).reshape(-1, 5)])
    table = table[np.argsort(table[:, 0], kind="stable")]
    document, kept, context, start, end = np.ascontiguousarray(table.T)
    split = int((~fits).sum())
    return Pieces(document, kept, context, start, end, split, windowed, cut_headers, repeated, unseen)


def _covered(spans: list[_Span]) -> int:
    """The tokens that are in a span; both their begins and their ends rise."""
    return sum(end - max(context, before) for (_, _, before), (context, _, end) in pairwise([(0, 0, 0), *spans]))


def _split(prompts: list[int], replies: list[int], length: int, room: int) -> Iterator[_Span]:
    """The spans of one document, for `room` tokens each behind the header."""
    ends = [*prompts[1:], length]
    turn, count = 0, len(prompts)
    while turn < count:
        if ends[turn] - prompts[turn] > room:
            yield from _windows(prompts[turn], replies[turn], ends[turn], room)
            turn += 1
            continue
        # A later piece is not filled with new turns alone: the first of them would have no context.
        most = room - room // _CONTEXT if turn else room
        after = turn + 1
        while after < count and ends[after] - prompts[turn] <= most:
            after += 1
        first = turn
        while first > 0 and ends[after - 1] - prompts[first - 1] <= room:
            first -= 1
        yield prompts[first], prompts[turn], ends[after - 1]
        turn = after


def _windows(prompt: int, reply: int, end: int, room: int) -> Iterator[_Span]:
    """The spans of one turn that is longer than `room`. Of a long prompt the first has the end, as much of it as the
    reply leaves, but half the room at least."""
    context = max(prompt, reply - max(room // 2, room - (end - reply)))
    stop = min(end, context + room)
    yield context, reply, stop
    while stop < end:
        start, stop = stop, min(end, stop + room - room // _CONTEXT)
        yield stop - room, start, stop
