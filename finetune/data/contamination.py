"""Training queries that are too close to a query of a test set.

Closeness is BLEU-4 without smoothing, on lower-cased words (runs of letters, digits and underscores; punctuation does
not count), of each user turn on its own against each test query. The authors do not say which of the two was the
candidate: the larger of both directions counts, so that neither reading lets a pair pass. A pair without a common run
of four words has a BLEU-4 of 0, so an index of the test sets' runs finds every pair that matters. It follows that a
test query of fewer than four words is never found.

Test sets are read in any file format that raw data may have. A row is the Koala set's {"prompt"}, the Alpaca set's
{"instruction", "instances": [{"input"}]}, which makes a query of each instance, or {"text"}. A query joins instruction
and input with a space, as training rows of that kind do.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_local.errors import KoalaError

from .raw_files import Skipped, rows

THRESHOLD = 0.2
_LONGEST = 4  # words of a run
_WORD = re.compile(r"\w+")
_PATTERNS = ("*koala_test_set*.json*", "*alpaca_test_set*.json*", "*user_oriented_instructions*.json*")
_SCHEMAS = 'rows are {"prompt"}, {"text"} or {"instruction", "instances": [{"input"}]}'

Run = tuple[str, ...]


class EvaluationSetError(KoalaError):
    """A test set that cannot be read: going on without it would train on what is tested."""


@dataclass(frozen=True, slots=True)
class TestQuery:
    """One query of a test set; `row` is where it stands, such as "koala_test_set.jsonl:3"."""

    __test__ = False  # for pytest, which takes the name for a test's

    row: str
    text: str


@dataclass(frozen=True, slots=True)
class Match:
    """A training query that is too close to a test query."""

    query: TestQuery
    bleu: float
    text: str  # of the training query


@dataclass(frozen=True, slots=True)
class _Counted:
    """Words, counted: `runs[n - 1]` holds how often each run of n words occurs."""

    length: int
    runs: tuple[Counter[Run], ...]


class TestSets:
    """Test queries, ready to be compared with any number of training queries."""

    __test__ = False

    def __init__(self, queries: Iterable[TestQuery]) -> None:
        self.queries = list(queries)
        self._counted = [_count(_words(query.text)) for query in self.queries]
        self._by_run: dict[Run, list[int]] = {}
        for number, counted in enumerate(self._counted):
            for run in counted.runs[-1]:
                self._by_run.setdefault(run, []).append(number)

    def worst(self, text: str) -> Match | None:
        """The test query that is closest to `text`, where any is too close."""
        words = _words(text)
        runs = set(_runs(words, _LONGEST))
        if self._by_run.keys().isdisjoint(runs):
            return None
        mine = _count(words)
        near = {number for run in runs for number in self._by_run.get(run, ())}
        bleu, number = max((_symmetric_bleu(self._counted[number], mine), -number) for number in near)
        return Match(self.queries[-number], bleu, text) if bleu > THRESHOLD else None


def _symmetric_bleu(left: _Counted, right: _Counted) -> float:
    """0.0 already where the lengths alone keep it below the threshold: it is never above the ratio of the lengths."""
    if min(left.length, right.length) <= THRESHOLD * max(left.length, right.length):
        return 0.0
    common = _common(left, right)
    return max(_bleu(common, left.length, right.length), _bleu(common, right.length, left.length))


def _common(left: _Counted, right: _Counted) -> list[int]:
    """How many runs of each length both have, each as often as it is in the one that has it less often."""
    return [(mine & theirs).total() for mine, theirs in zip(left.runs, right.runs, strict=True)]


def _bleu(common: Sequence[int], candidate: int, reference: int) -> float:
    """Sentence BLEU of runs of one to four words, unsmoothed, with the brevity penalty (Papineni et al., 2002)."""
    if not all(common):
        return 0.0
    precisions = sum(math.log(count / (candidate - n)) for n, count in enumerate(common))
    return math.exp(precisions / _LONGEST + min(0.0, 1 - reference / candidate))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterable[Run]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _count(words: Sequence[str]) -> _Counted:
    return _Counted(len(words), tuple(Counter(_runs(words, n)) for n in range(1, _LONGEST + 1)))


def find_sets(raw: Path) -> list[Path]:
    """The test sets beside the raw data, known by their names."""
    return sorted({path for pattern in _PATTERNS for path in (raw / "eval").glob(pattern)})


def read_set(path: Path) -> list[TestQuery]:
    """The queries of a test set. Raises EvaluationSetError, RawFileError."""
    queries: list[TestQuery] = []
    for row in rows(path):
        if isinstance(row, Skipped):
            raise EvaluationSetError(f"the test set {str(path)!r} is damaged: {row.row} is {row.reason}", _SCHEMAS)
        name, value = row
        queries += [TestQuery(name, text) for text in _queries(value, name)]
    if not queries:
        raise EvaluationSetError(f"the test set {str(path)!r} has no queries", _SCHEMAS)
    return queries


def _queries(row: Any, name: str) -> list[str]:
    match row:
        case {"prompt": str(text)} | {"text": str(text)}:
            return [text]
        case {"instruction": str(text), "instances": [*instances]} if instances:
            inputs = [each.get("input") or "" if isinstance(each, dict) else None for each in instances]
            if all(isinstance(each, str) for each in inputs):
                return [f"{text} {each}" if each else text for each in inputs]
        case {"instruction": str(text)} if "instances" not in row:
            return [f"{text} {row['input']}" if isinstance(row.get("input"), str) and row["input"] else text]
    raise EvaluationSetError(f"{name} is no row of a test set that is known", _SCHEMAS)
