"""Closeness to test queries, against a slow BLEU written for this test and a full scan."""

from __future__ import annotations

import math
import string
from random import Random

import pytest
from koala_local.finetune.data.contamination import THRESHOLD, TestQuery, TestSets


def slow_bleu(candidate: str, reference: str) -> float:
    """By the book: for each run of the candidate, cross one equal run of the reference out."""
    cand, ref = _tokens(candidate), _tokens(reference)
    product = 1.0
    for n in (1, 2, 3, 4):
        runs = [" ".join(cand[i : i + n]) for i in range(len(cand) - n + 1)]
        left = [" ".join(ref[i : i + n]) for i in range(len(ref) - n + 1)]
        hits = 0
        for run in runs:
            if run in left:
                left.remove(run)
                hits += 1
        if not hits:
            return 0.0
        product *= hits / len(runs)
    penalty = 1.0 if len(cand) > len(ref) else math.exp(1 - len(ref) / len(cand))
    return float(penalty * product**0.25)


def _tokens(text: str) -> list[str]:
    return text.lower().translate({ord(c): " " for c in string.punctuation}).split()


def sets(*queries: str) -> TestSets:
    return TestSets(TestQuery(f"test.jsonl:{row}", text) for row, text in enumerate(queries, 1))


def random_queries(random: Random, count: int) -> list[str]:
    """Sentences of words and phrases, so that many share runs, once or several times."""
    parts = [
        *["the", "a", "fox", "hen", "runs", "sees", "by", "of", "river", "mill", "old", "new", "and", "to"],
        "by the old mill",
        "a fox sees the hen",
    ]
    return [" ".join(random.choices(parts, [1] * 14 + [3, 3], k=random.randint(1, 15))) for _ in range(count)]


def test_case_and_punctuation_do_not_count() -> None:
    match = sets("the cat sat on the mat").worst("The cat sat, on the mat!")
    assert match is not None and match.bleu == pytest.approx(1.0)


def test_the_index_misses_nothing() -> None:
    """The oracle: every pair, in both directions."""
    random = Random(2)
    tests = random_queries(random, 40)
    tests += [f"{tests[0]} {tests[1]}", tests[2]]
    found = sets(*tests)
    caught = 0
    for query in [*random_queries(random, 400), *tests, f"{tests[3]} {tests[4]} {tests[5]}"]:
        worst = max(max(slow_bleu(query, test), slow_bleu(test, query)) for test in tests)
        match = found.worst(query)
        assert (match is not None) == (worst > THRESHOLD)
        if match is not None:
            caught += 1
            assert match.bleu == pytest.approx(worst, abs=1e-12)
            assert match.query.text in tests
    assert 50 < caught < 400


def test_both_directions_count() -> None:
    test = "name three birds that can not fly"
    longer = f"{test} and then say for each of them where on earth it lives"
    assert slow_bleu(test, longer) < THRESHOLD < slow_bleu(longer, test)
    assert sets(test).worst(longer) is not None
    assert sets(longer).worst(test) is not None


@pytest.mark.parametrize(
    "query", ["", "???", "one", "name three birds", "an unrelated question about the price of tea"]
)
def test_what_shares_no_four_words_passes(query: str) -> None:
    assert sets("name three birds that can not fly", "name three birds", "").worst(query) is None


def test_the_first_of_equals_is_named() -> None:
    match = sets("other words that are here", "who made this old house", "who made this old house").worst(
        "Who made this old house?"
    )
    assert match is not None and match.query.row == "test.jsonl:2" and match.bleu == pytest.approx(1.0)
