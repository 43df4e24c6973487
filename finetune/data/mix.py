"""The mix: raw rows of every source of a recipe -> examples that are trained on.

Two passes. The first reads one source after the other, judges each example on its own, and leaves a *stage* of each:
what stays, and a count of what does not. A stage is named after everything it follows from (the raw files, the rules,
the test sets, the code), so that a build that was stopped goes on behind the last whole one. The second pass needs the
order: it drops repeated queries, chooses what is held out, and writes the mix.

An example is counted under the first reason that applies: keyword, language, contaminated, exact duplicate, near one.
A plain text has no query: it is never contaminated, and a duplicate only where it repeats another whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b, sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from .cleaning import has_keyword, is_english
from .contamination import Match, TestQuery, TestSets
from .duplicates import Fingerprint, Seen, fingerprint
from .examples import Example, from_line, hold_out, read_lines, texts, to_line, write_lines, write_tree
from .recipe import SourceRules
from .sources import Skipped
from .workers import Workers, batches

REASONS = ("keyword", "language", "contaminated", "exact", "near")
LISTED = 50  # rows of each source and reason are named
HELD_OUT_SHARE, HELD_OUT_MOST = 100, 200  # one in so many examples of a source is held out, and at most so many
_BATCH = 256

Tell = Callable[[str, int, int | None], None]  # what is done, how many are done, of how many where that is known


@dataclass(slots=True)
class Tally:
    """What became of the rows of one source. Everything but `rows` and `skipped` counts examples."""

    rows: int = 0
    examples: int = 0
    kept: int = 0
    held_out: int = 0
    turns: int = 0  # of what is kept
    texts: int = 0  # examples of what is kept that are plain text
    unhelpful: int = 0  # examples of what is kept that are the worse one of a pair
    skipped: dict[str, int] = field(default_factory=dict)  # rows or dialogues of one, by what is wrong with them
    removed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    skipped_rows: list[dict[str, str]] = field(default_factory=list)  # {"row", "reason"} of the first ones
    removed_rows: list[dict[str, str]] = field(default_factory=list)  # as well, of each reason
    contaminated: list[dict[str, Any]] = field(
        default_factory=list
    )  # {"row", "bleu", "query", "test_row", "test"}, worst first

    def skip(self, skipped: Skipped) -> None:
        """Count a row, or one of its dialogues, that cannot be used."""
        self.skipped[skipped.reason] = self.skipped.get(skipped.reason, 0) + 1
        if self.skipped[skipped.reason] <= LISTED:
            self.skipped_rows.append({"row": skipped.row, "reason": skipped.reason})

    def remove(self, row: str, reason: str, match: Match | None = None) -> None:
        """Count an example that is left out."""
        self.removed[reason] += 1
        if self.removed[reason] <= LISTED:
            self.removed_rows.append({"row": row, "reason": reason})
        if match is not None:
            found = {"bleu": round(match.bleu, 4), "query": match.text[:500], "test": match.query.text[:500]}
            self.contaminated.append({"row": row, "test_row": match.query.row, **found})
            self.contaminated = sorted(self.contaminated, key=lambda each: -each["bleu"])[:LISTED]


@dataclass(frozen=True, slots=True)
class Stage:
    """What the first pass leaves of one source."""

    key: str
    rules: SourceRules
    path: Path
    tally: Tally


@dataclass(frozen=True, slots=True)
class _Verdict:
    reason: str = ""  # empty: it stays
    match: Match | None = None


def stage_name(key: str, rules: SourceRules, inputs: Sequence[str], seed: int, tests: Sequence[TestQuery]) -> str:
    """The name of a stage: `inputs` name the raw files and their hashes."""
    applied = [list(rules.keywords), rules.english, [[q.row, q.text] for q in tests] if rules.decontaminate else []]
    told = json.dumps([key, applied, list(inputs), seed, _code_version()])
    return f"{key}-{sha256(told.encode()).hexdigest()[:16]}"


def make_stage(
    key: str,
    rules: SourceRules,
    rows: Callable[[], Iterable[Example | Skipped]],
    tests: Sequence[TestQuery],
    path: Path,
    work: Workers,
    tell: Tell,
) -> Stage:
    """The stage of one source at `path`, made of its rows unless it is there. Passes on what reading them raises."""
    summary = path.with_suffix(".json")
    if path.is_file() and summary.is_file():  # the summary is written last
        return Stage(key, rules, path, Tally(**json.loads(summary.read_text("utf-8"))))
    tally = Tally()
    judge = partial(_judge_all, rules=rules, tests=tuple(tests) if rules.decontaminate else ())
    examples = batches(_examples(rows(), tally), _BATCH)
    write_lines(path, _staying(work.map(judge, examples), tally, lambda: tell(key, tally.rows, None)))
    write_tree(summary, asdict(tally))
    return Stage(key, rules, path, tally)


def write_mix(stages: Sequence[Stage], path: Path, work: Workers, tell: Tell) -> dict[str, Tally]:
    """Write the mix of the stages, in their order, and return each source's tally."""
    seen, tallies = Seen(), {}
    total = sum(stage.tally.examples - sum(stage.tally.removed.values()) for stage in stages)
    choices: list[tuple[Stage, list[int]]] = []
    done = 0
    for stage in stages:
        tallies[stage.key] = tally = stage.tally
        keep = _without_duplicates(stage, seen, work, lambda n: tell("duplicates", done + n, total))  # noqa: B023
        done += len(keep)
        chosen = choose_held_out([number for number in keep if number >= 0])
        tally.kept, tally.held_out = sum(number >= 0 for number in keep), 0
        choices.append((stage, [_HELD if number in chosen else _KEPT if number >= 0 else _DROPPED for number in keep]))
    write_lines(path, _chosen_lines(choices))
    return tallies


_DROPPED, _KEPT, _HELD = 0, 1, 2


def choose_held_out(groups: Sequence[int]) -> set[int]:
    """Of the numbers that stand for the examples' groups (equal: the same group), those that are held out: whole
    groups, smallest numbers first, as many as make up the share."""
    room = min(HELD_OUT_MOST, len(groups) // HELD_OUT_SHARE)
    chosen: set[int] = set()
    for number, size in sorted(Counter(groups).items()):
        if size <= room:
            chosen.add(number)
            room -= size
        if not room:
            break
    return chosen


def _chosen_lines(choices: Iterable[tuple[Stage, list[int]]]) -> Iterator[str]:
    for stage, marks in choices:
        for line, mark in zip(read_lines(stage.path), marks, strict=True):
            if mark:
                stage.tally.turns += line.count('{"user": ')  # quotes in texts are escaped: it is never one of them
                stage.tally.texts += line.count('"text": ')
                stage.tally.unhelpful += line.count('"helpful": false') > 0
                stage.tally.held_out += mark == _HELD
                yield hold_out(line) if mark == _HELD else line


def _examples(rows: Iterable[Example | Skipped], tally: Tally) -> Iterator[Example]:
    for _, group in groupby(rows, lambda each: each.row):
        tally.rows += 1
        for each in group:
            if isinstance(each, Skipped):
                tally.skip(each)
            else:
                tally.examples += 1
                yield each


def _staying(
    judged: Iterable[tuple[list[Example], list[_Verdict]]], tally: Tally, tell: Callable[[], None]
) -> Iterator[str]:
    for examples, verdicts in judged:
        for example, verdict in zip(examples, verdicts, strict=True):
            if verdict.reason:
                tally.remove(example.row, verdict.reason, verdict.match)
            else:
                yield to_line(example)
        tell()


def _judge_all(examples: list[Example], rules: SourceRules, tests: tuple[TestQuery, ...]) -> list[_Verdict]:
    sets = _test_sets(tests)
    return [_judge(example, rules, sets) for example in examples]


def _judge(example: Example, rules: SourceRules, tests: TestSets) -> _Verdict:
    said = texts(example.content)
    if rules.keywords and has_keyword([*said, *example.dropped], rules.keywords):
        return _Verdict("keyword")
    if rules.english and not is_english(said):
        return _Verdict("language")
    if isinstance(example.content, str):
        return _Verdict()
    matches = [match for turn in example.content.turns if (match := tests.worst(turn.user))]
    return _Verdict("contaminated", max(matches, key=lambda match: match.bleu)) if matches else _Verdict()


@lru_cache(maxsize=1)
def _test_sets(queries: tuple[TestQuery, ...]) -> TestSets:
    return TestSets(queries)


def _without_duplicates(stage: Stage, seen: Seen, work: Workers, tell: Callable[[int], None]) -> list[int]:
    """For each example the number of its group, or -1 where its query is a repeated one. Examples of one raw row, such
    as the two replies of a pair, share their query: they stand and fall together."""
    found: list[int] = []
    row, verdict = None, ""
    function = partial(_group_all, duplicates=stage.rules.duplicates)
    for _, groups in work.map(function, batches(read_lines(stage.path), _BATCH)):
        for name, number, query in groups:
            if query is not None and name != row:
                row, verdict = name, seen.add(query)
            if verdict and query is not None:
                stage.tally.remove(name, verdict)
            found.append(-1 if verdict and query is not None else number)
        tell(len(found))
    return found


def _group_all(lines: list[str], duplicates: str) -> list[tuple[str, int, Fingerprint | None]]:
    return [_group(from_line(line), duplicates) for line in lines]


def _group(example: Example, duplicates: str) -> tuple[str, int, Fingerprint | None]:
    """The raw row, a number that depends on the first thing the user says, or on the whole of a plain text, and the
    query's fingerprint if it counts."""
    content = example.content
    first = content if isinstance(content, str) else content.turns[0].user
    number = int.from_bytes(blake2b(first.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "big")
    if duplicates == "keep":
        return example.row, number, None
    if isinstance(content, str):
        return example.row, number, fingerprint(content, near=False, kind="text")
    return example.row, number, fingerprint("\n".join(turn.user for turn in content.turns), near=duplicates == "near")


@lru_cache(maxsize=1)
def _code_version() -> str:
    """A hash of what decides a stage: the modules of the sources and of the first pass."""
    here = Path(__file__).parent
    names = ("mix.py", "examples.py", "cleaning.py", "contamination.py", "raw_files.py")
    paths = [*(here / name for name in names), *sorted((here / "sources").glob("*.*"))]
    return sha256(b"".join(path.name.encode() + path.read_bytes() for path in paths)).hexdigest()
