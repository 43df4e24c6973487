"""Repeated queries, against all pairs compared one by one."""

from __future__ import annotations

from random import Random

import pytest
from koala_local.finetune.data.duplicates import THRESHOLD, Seen, fingerprint

LONG = "please write me a short story about a fox who learns to count the stars above the old mill by the river"


def judge(queries: list[str], near: bool = True) -> list[str]:
    seen = Seen()
    return [seen.add(fingerprint(query, near=near)) for query in queries]


def test_the_first_stays() -> None:
    assert judge(["What is love?", "Who are you?", "what is  love", "WHAT IS LOVE!"]) == ["", "", "exact", "exact"]


def test_a_text_is_no_duplicate_of_a_query() -> None:
    seen = Seen()
    assert seen.add(fingerprint(LONG, near=True)) == ""
    assert seen.add(fingerprint(LONG, near=False, kind="text")) == ""
    assert seen.add(fingerprint(LONG.upper(), near=False, kind="text")) == "exact"


def test_one_word_more_is_near() -> None:
    assert judge([LONG, f"{LONG} today", LONG]) == ["", "near", "exact"]
    assert judge([LONG, f"{LONG} today", LONG], near=False) == ["", "", "exact"]


@pytest.mark.parametrize(
    "other", ["hi there", "hello", "?", "!", "😀", "", LONG.replace("fox", "bear").replace("stars", "sun")]
)
def test_others_stay(other: str) -> None:
    assert judge([LONG, "hi", "😀😀", ".", other])[-1] == ""


def test_signs_alone_are_told_apart() -> None:
    assert judge(["?", "!", "?", "\ud800"]) == ["", "", "exact", ""]


def test_nearness_is_that_of_the_shingles() -> None:
    """An independent slow scan: a query is a near duplicate where one that stayed has a Jaccard similarity of at least
    the threshold. The index may miss some, and never finds one too many."""
    queries = _variants(Random(5))
    found = judge(queries)
    kept: list[set[tuple[str, ...]]] = []
    missed = 0
    for query, verdict in zip(queries, found, strict=True):
        words = query.split()
        shingles = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        near = any(len(old & shingles) / len(old | shingles) >= THRESHOLD for old in kept)
        assert near or not verdict
        missed += near and not verdict
        kept += [] if verdict else [shingles]
    assert missed <= 3
    assert found.count("near") > 50 and found.count("") > 50


def _variants(random: Random) -> list[str]:
    """Sentences with words changed, few or many."""
    words = [a + b for a in ("ba", "ko", "mi", "tu", "re") for b in "nrstlkm"]
    bases = [[random.choice(words) for _ in range(random.randint(15, 40))] for _ in range(60)]
    made = []
    for _ in range(600):
        changed = list(random.choice(bases))
        for _ in range(random.choice([0, 1, 1, 2, 4])):
            changed[random.choice([0, 1, len(changed) - 1, random.randrange(len(changed))])] = random.choice(words)
        made.append(" ".join(changed))
    return made
