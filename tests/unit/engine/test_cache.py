"""What the cache holds is what a fresh evaluation would give, and cells are counted exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from koala_local.engine.bindings import ll
from koala_local.engine.cache import PrefixCache, common_prefix
from koala_local.engine.llama import LlamaEngine
from koala_local.errors import ContextError, Interrupted, KoalaError
from tests.engines import tiny_engine

TOLERANCE = 0.02  # logits of the same ids through other batch cuts differ a little; the spread here is above 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"), context=256)
    yield engine
    engine.close()


@pytest.fixture
def cache(engine: LlamaEngine) -> Iterator[PrefixCache]:
    cache = PrefixCache(engine)
    yield cache
    cache.clear()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    """The same weights, used only to evaluate whole lists from nothing."""
    engine = tiny_engine(tmp_path_factory.mktemp("reference"), context=256)
    yield engine
    engine.close()


def fresh_logits(reference: LlamaEngine, ids: list[int]) -> list[float]:
    reference.crop(0, 0)
    reference.evaluate(ids, slot=0, position=0)
    return reference.logits()


def assert_close(left: list[float], right: list[float]) -> None:
    assert max(right) - min(right) > 0.5
    assert max(abs(a - b) for a, b in zip(left, right, strict=True)) < TOLERANCE


def read(cache: PrefixCache, ids: list[int]) -> int:
    """Adopt, evaluate the rest, return how many tokens were evaluated."""
    before = cache.engine.evaluated_tokens
    cache.extend(ids[cache.adopt(ids) :])
    return cache.engine.evaluated_tokens - before


@pytest.mark.parametrize(("left", "right", "length"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4], 2)])
def test_common_prefix(left: list[int], right: list[int], length: int) -> None:
    assert common_prefix(left, right) == length


def test_common_prefix_against_a_plain_loop() -> None:
    draw = random.Random(1)
    for _ in range(500):
        left, right = ([draw.randrange(2) for _ in range(draw.randrange(12))] for _ in range(2))
        plain = 0
        while plain < min(len(left), len(right)) and left[plain] == right[plain]:
            plain += 1
        assert common_prefix(left, right) == plain


def test_only_new_tokens_are_evaluated(cache: PrefixCache) -> None:
    assert read(cache, [1, 10, 11, 12]) == 4
    assert read(cache, [1, 10, 11, 12, 13]) == 1
    assert read(cache, [1, 10, 11, 12, 13]) == 0
    assert cache.ids == [1, 10, 11, 12, 13]


def test_a_branch_is_held_and_comes_back_for_nothing(cache: PrefixCache, reference: LlamaEngine) -> None:
    first, second = [1, *range(10, 40)], [1, *range(10, 20), *range(60, 80)]
    assert read(cache, first) == len(first)
    assert read(cache, second) == 20
    assert cache.held == 1
    assert cache.used_cells == len(first) + 20  # the common part is stored once
    assert read(cache, first) == 0
    assert read(cache, [*first, 50]) == 1
    assert_close(cache.engine.logits(), fresh_logits(reference, [*first, 50]))  # type: ignore[attr-defined]
    assert read(cache, [*second, 51]) == 1
    assert_close(cache.engine.logits(), fresh_logits(reference, [*second, 51]))  # type: ignore[attr-defined]


def test_held_branches_leave_before_the_active_one_lacks_cells(cache: PrefixCache) -> None:
    for start in (3, 103, 203):
        read(cache, [1, *(start + n % 90 for n in range(80))])
    assert cache.held == 2
    active = [1, *(5 + n % 200 for n in range(255))]
    assert read(cache, active) == 255  # the BOS is common to all
    assert (cache.held, cache.used_cells) == (0, 256)
    with pytest.raises(ContextError):
        cache.extend([9])
    assert cache.ids == active


def test_the_least_recently_used_branch_leaves_first(cache: PrefixCache) -> None:
    branches = [[1, *([start] * 70)] for start in (10, 20, 30)]
    for branch in branches:
        read(cache, branch)
    read(cache, branches[0])
    read(cache, [1, *([40] * 60)])  # 211 cells are used before: the second branch has to leave
    assert read(cache, branches[0]) == 0
    assert read(cache, branches[2]) == 0
    assert read(cache, branches[1]) > 0


def test_more_branches_than_slots(cache: PrefixCache) -> None:
    for token in range(10, 10 + 2 * cache.engine.slots):
        read(cache, [1, 5, token, token])
    assert cache.held == cache.engine.slots - 1
    assert read(cache, [1, 5, 9]) == 1


def test_shift_moves_what_follows_down(cache: PrefixCache) -> None:
    read(cache, [1, *range(10, 60)])
    cells = cache.used_cells
    cache.shift(5, 25)
    assert cache.ids == [1, *range(10, 14), *range(34, 60)]
    assert cache.used_cells == cells - 20
    assert read(cache, [*cache.ids, 7]) == 1


def test_a_shift_that_fails_leaves_an_empty_slot(cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
    read(cache, [1, *range(10, 60)])
    with monkeypatch.context() as broken:
        broken.setattr(ll, "llama_decode", lambda *_: -3)
        with pytest.raises(KoalaError):
            cache.shift(5, 25)
    assert (cache.ids, cache.used_cells) == ([], 0)
    assert read(cache, [1, 10, 11]) == 3


def test_an_interrupt_keeps_what_was_evaluated(cache: PrefixCache) -> None:
    read(cache, [1, 10, 11])
    cache.engine.interrupt()
    with pytest.raises(Interrupted):
        cache.extend([12, 13])
    cache.engine.resume()
    assert cache.ids == [1, 10, 11]
    assert read(cache, [1, 10, 11, 12, 13]) == 2


def test_a_drawn_token_is_evaluated_when_the_next_one_is_wanted(cache: PrefixCache, reference: LlamaEngine) -> None:
    read(cache, [1, 10, 11])
    drawn = iter(range(20, 30))
    tokens = cache.generate(drawn.__next__, 4)
    assert [next(tokens), next(tokens)] == [20, 21]
    assert cache.ids == [1, 10, 11, 20]
    assert (list(tokens), next(drawn)) == ([22, 23], 24)
    assert cache.ids == [1, 10, 11, 20, 21, 22, 23]
    assert cache.used_cells == 7
    assert_close(cache.engine.logits(), fresh_logits(reference, cache.ids))  # type: ignore[attr-defined]


def test_held_branches_make_way_for_drawn_tokens(cache: PrefixCache, reference: LlamaEngine) -> None:
    read(cache, [1, *range(10, 130)])
    read(cache, [1, *range(130, 230)])
    drawn = iter(range(20, 200))
    assert list(cache.generate(drawn.__next__, 35)) == list(range(20, 55))
    assert (cache.held, cache.used_cells) == (1, 256)
    assert list(cache.generate(drawn.__next__, 1)) == [55]
    assert (cache.held, cache.used_cells) == (0, 137)
    assert_close(cache.engine.logits(), fresh_logits(reference, cache.ids))  # type: ignore[attr-defined]


def test_an_interrupt_keeps_the_tokens_drawn_before(cache: PrefixCache) -> None:
    read(cache, [1, 10])
    tokens = cache.generate(iter(range(20, 30)).__next__, 9)
    assert [next(tokens), next(tokens)] == [20, 21]
    cache.engine.interrupt()
    with pytest.raises(Interrupted):
        next(tokens)
    cache.engine.resume()
    assert (cache.ids, cache.used_cells) == ([1, 10, 20], 3)
    assert read(cache, [1, 10, 20, 21]) == 1


def test_random_walk_against_a_fresh_evaluation(cache: PrefixCache, reference: LlamaEngine) -> None:
    draw = random.Random(7)
    paths: list[list[int]] = [[1, 10, 11]]
    for step in range(120):
        path = list(draw.choice(paths))
        path = path[: draw.randrange(1, len(path) + 1)] + [draw.randrange(3, 340) for _ in range(draw.randrange(1, 30))]
        path = path[:200]
        paths = [*paths[-6:], path]
        reused = cache.adopt(path)
        if reused == len(path):
            cache.crop(len(path) - 1)
        cache.extend(path[len(cache.ids) :])
        assert cache.ids == path
        assert cache.used_cells <= cache.engine.context_size
        if step % 10 == 0:
            assert_close(cache.engine.logits(), fresh_logits(reference, path))  # type: ignore[attr-defined]


class CopyingEngine:
    """An engine of the simplest kind: it can crop, and copies the whole KV for a branch."""

    slots, context_size, shares_cells, can_shift = 4, 60, False, False

    def __init__(self) -> None:
        self.kv: list[list[int]] = [[] for _ in range(self.slots)]
        self.evaluated_tokens = 0

    def evaluate(self, ids: list[int], *, slot: int, position: int) -> None:
        assert position == len(self.kv[slot])
        self.kv[slot] += ids
        self.evaluated_tokens += len(ids)
        assert sum(map(len, self.kv)) <= self.context_size

    def crop(self, slot: int, length: int) -> int:
        del self.kv[slot][length:]
        return length

    def copy(self, source: int, target: int) -> None:
        self.kv[target] = list(self.kv[source])


def test_a_backend_that_only_crops_and_copies() -> None:
    engine = CopyingEngine()
    cache = PrefixCache(engine)  # type: ignore[arg-type]
    draw = random.Random(2)
    path = [1]
    for _ in range(300):
        path = path[: draw.randrange(1, len(path) + 1)] + [draw.randrange(9) for _ in range(draw.randrange(1, 12))]
        path = path[:50]
        cache.extend(path[cache.adopt(path) :])
        assert engine.kv[cache.active] == cache.ids == path
        assert cache.used_cells == sum(map(len, engine.kv))
