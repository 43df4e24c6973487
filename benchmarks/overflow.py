"""What a full context costs, by the share of it that is kept when turns must leave (`ledger.KEEP`).

Keeping much shows the model more of the conversation, but the context is full again sooner. With `exact` all that is
kept is evaluated anew each time; with `shift` its KV is moved, which costs nothing but is approximate.

Cost: a long conversation whose turns take a twentieth of the context (as 200 tokens of 4096 do), the same for every
share. Counted are the tokens evaluated to read prompts, against the tokens that are new; the notes give the time to the
first token, how full the context is, and how much of the whole conversation the model still sees.

Error of `shift`: conversations with the bundled model, whose next-token distributions after shifts are compared with
those of a second engine that evaluates the same tokens at the same positions exactly. The means are over all tokens
drawn after the first shift; each conversation has many, and their errors add up. KL divergence in nats, and how often
the most probable token is the same; before the first shift the two differ by rounding alone. One small model in its own
small world: a hint, not a promise for others. A random model would say nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import count, pairwise
from random import Random
from statistics import mean
from unittest.mock import patch

import numpy as np

from benchmarks.models import Model
from benchmarks.table import Row
from benchmarks.talk import Talk, numbered, question
from koala_local.chat.ledger import KEEP, Overflow, Stats
from koala_local.engine.cache import PrefixCache
from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.engine.llama_sampler import LlamaSampler
from koala_local.engine.sampling import Sampling
from koala_local.models.gguf_header import read_header

_SHARES = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
_CONTEXT = 1024
_REPLY = 20
_ERROR_TURNS = 90
_Found = list[tuple[float, bool]]  # of each token: KL divergence, whether the most probable one is the same


def run(model: Model, quick: bool) -> list[Row]:
    """Rows for the bundled model."""
    turns, shares = (30, (0.5, 0.75)) if quick else (150, _SHARES)
    rows = [_cost(model, mode, share, turns) for mode in ("exact", "shift") for share in shares]
    return rows + [_shift_error(model, share, 1 if quick else 4) for share in shares]


# -- cost


class _FixedLength(LlamaEngine):
    """Replies of exactly _REPLY tokens, so that every share sees the same conversation."""

    def sampler(self, sampling: Sampling, seed: int, before: Sequence[int]) -> LlamaSampler:
        return _FixedLengthSampler(self, sampling, seed, before)


class _FixedLengthSampler(LlamaSampler):
    def __init__(self, engine: _FixedLength, sampling: Sampling, seed: int, before: Sequence[int]) -> None:
        super().__init__(engine._context, engine.vocabulary.size, sampling, seed, before)
        draw, ends, left = self.sample, engine.vocabulary.ends, count(_REPLY - 1, -1)

        def sample() -> int:
            token = draw()
            if next(left) < 0:
                return min(ends)
            return before[-1] if token in ends else token

        self.sample = sample


def _cost(model: Model, mode: Overflow, share: float, turns: int) -> Row:
    stats, evaluated, whole = _long_talk(model, mode, share, turns)
    left = [after.dropped_turns > before.dropped_turns for before, after in pairwise(stats)]
    new = mean(count for count, full in zip(evaluated[1:], left, strict=True) if not full)
    full = range(left.index(True) + 1, turns)
    waits = [1000 * stats[turn].ttft_s for turn in full]
    seen = mean(stats[turn].prompt_tokens / whole[turn] for turn in full)
    filled = mean(stats[turn].prompt_tokens / stats[turn].context_size for turn in full)
    per_turn = mean(evaluated[turn] for turn in full)
    return Row(
        f"overflow {mode}, keep {share:g}",
        per_turn,
        "tokens/turn",
        new,
        "new tokens",
        per_turn / new,
        note=f"first token {mean(waits):.0f} ms, at most {max(waits):.0f}; {filled:.0%} of the context filled, "
        f"{seen:.0%} of {turns} turns seen; {sum(left)} overflows",
    )


def _long_talk(model: Model, mode: Overflow, share: float, turns: int) -> tuple[list[Stats], list[int], list[int]]:
    """Per turn: what the ledger says, the tokens evaluated to read prompts, the tokens of the whole conversation."""
    engine = _FixedLength(model.path, read_header(model.path).fingerprint, Placement(_CONTEXT))
    stats: list[Stats] = []
    evaluated: list[int] = []
    whole: list[int] = []
    with closing(engine), patch.dict(KEEP, {mode: share}):
        talk = Talk(engine, mode)
        for turn in range(turns):
            before = engine.evaluated_tokens
            stats.append(talk.say(numbered(turn % 100, 2)))
            evaluated.append(engine.evaluated_tokens - before - _REPLY - 1)  # without the reply and its end
            whole.append(len(talk.ledger.ids("", talk.path)))
    return stats, evaluated, whole


# -- error


class _Watched(LlamaEngine):
    """Shows the logits from which each token of a reply is drawn, with the tokens before it."""

    watch: Callable[[list[int], list[float]], None]

    def sampler(self, sampling: Sampling, seed: int, before: Sequence[int]) -> LlamaSampler:
        return _WatchedSampler(self, sampling, seed, before)


class _WatchedSampler(LlamaSampler):
    def __init__(self, engine: _Watched, sampling: Sampling, seed: int, before: Sequence[int]) -> None:
        super().__init__(engine._context, engine.vocabulary.size, sampling, seed, before)
        draw, ids = self.sample, list(before)

        def sample() -> int:
            engine.watch(ids, engine.logits())
            ids.append(draw())
            return ids[-1]

        self.sample = sample


def _shift_error(model: Model, share: float, talks: int) -> Row:
    """How far the distributions are off after the first shift of each conversation."""
    before: _Found = []
    after: _Found = []
    fingerprint = read_header(model.path).fingerprint
    with (
        closing(_Watched(model.path, fingerprint, Placement(_CONTEXT))) as engine,
        closing(LlamaEngine(model.path, fingerprint, Placement(_CONTEXT))) as exact,
        patch.dict(KEEP, {"shift": share}),
    ):
        shifts = sum(_compare(engine, exact, seed, before, after) for seed in range(talks))
    same, rounding = (mean(same for _, same in part) for part in (after, before))
    return Row(
        f"shift error, keep {share:g}, {model.name}",
        mean(error for error, _ in after),
        "nats",
        mean(error for error, _ in before),
        "rounding",
        note=f"same top token {same:.1%} (rounding: {rounding:.1%}); {len(after)} tokens, {shifts} shifts",
    )


def _compare(engine: _Watched, exact: LlamaEngine, seed: int, before: _Found, after: _Found) -> int:
    """One conversation; adds what it finds to the lists and returns the number of shifts."""
    talk, reference, random, shifts = Talk(engine, "shift"), PrefixCache(exact), Random(seed), 0
    found: _Found = []
    engine.watch = lambda ids, logits: found.append(_difference(_exact_logits(reference, exact, ids), logits))
    for _ in range(_ERROR_TURNS):
        dropped = talk.dropped
        talk.say(question(random), 32)
        shifts += talk.dropped > dropped
        (after if talk.dropped else before).extend(found)
        found.clear()
    return shifts


def _exact_logits(cache: PrefixCache, engine: LlamaEngine, ids: list[int]) -> list[float]:
    held = cache.adopt(ids, hold=False)
    if held == len(ids):
        held -= 1
        cache.crop(held)
    cache.extend(ids[held:])
    return engine.logits()


def _difference(exact: list[float], approximate: list[float]) -> tuple[float, bool]:
    """KL(exact, approximate) in nats, and whether both have the same most probable token."""
    left, right = _log_softmax(exact), _log_softmax(approximate)
    return float((np.exp(left) * (left - right)).sum()), bool(left.argmax() == right.argmax())


def _log_softmax(logits: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = np.asarray(logits, dtype=np.float64) - max(logits)
    result: np.ndarray[tuple[int], np.dtype[np.float64]] = values - np.log(np.exp(values).sum())
    return result
