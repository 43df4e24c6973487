"""The test sets that training data is held against, in any file format that raw data may have.

A row is the Koala set's {"prompt"}, the Alpaca set's {"instruction", "instances": [{"input"}]}, which makes a query of
each instance, or {"text"}. A query joins instruction and input with a space, as training rows of that kind do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koala_local.errors import KoalaError

from .contamination import TestQuery
from .raw_files import Skipped, rows

PATTERNS = ("*koala_test_set*.json*", "*alpaca_test_set*.json*", "*user_oriented_instructions*.json*")
_SCHEMAS = 'rows are {"prompt"}, {"text"} or {"instruction", "instances": [{"input"}]}'


class EvaluationSetError(KoalaError):
    """A test set that cannot be read: going on without it would train on what is tested."""


def find_sets(raw: Path) -> list[Path]:
    """The test sets beside the raw data, known by their names."""
    return sorted({path for pattern in PATTERNS for path in (raw / "eval").glob(pattern)})


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
