"""How fast a reply is written: `Ledger.reply` (sampling, text, stop strings, the cache's book-keeping) against a bare
loop over llama.cpp with the same sampler chain, and against streaming from the `Llama` class.

Ledger and bare loop take turns about every 64 tokens of a reply, at the same positions, so that whatever else the
machine does meets both; the ratio of a reply is the median of these slices. Of two copies of a model one decodes some
percent faster, by where it lies in memory: two bare loops side by side differ by 3 % (standard deviation). So both are
loaded anew for every reply, each of them first every other time, and the ratio is the mean of many replies: two long
ones, the others short.

The Python time per token comes from a reply in which llama.cpp's decode and sample are timed: what is left of the loop
is Python, with the bare loop's own beside it. Reading a model's weights pushes all else out of the processor's caches,
so this is mostly the time to fetch what Python touches, more behind a larger model and a longer history. Whether
anything is done again for every token written so far shows in another reply, in which llama.cpp's part is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from itertools import accumulate, chain, pairwise
from statistics import geometric_mean, median, stdev
from typing import Any
from unittest.mock import patch

import llama_cpp.llama_cpp as ll

from benchmarks.models import CONTEXT, Model
from benchmarks.peers import BareLoop, HighLevel
from benchmarks.table import Row
from benchmarks.talk import Talk, numbered, rendered
from koala_local.chat.ledger import Exchange
from koala_local.dialogue import Turn
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling

_SLICE = 64
_LEAST_S, _LEAST, _SHORT = 60.0, 16, 400  # short replies follow until there are so many, and so long has passed
_ALONE = 20  # replies without llama.cpp; each token's fastest counts, as the processor's clock goes up and down
_HIGH_LEVEL_TOKENS = 1000  # its streaming slows down with every token
_Times = list[tuple[int, float, float]]  # of slices: tokens, ledger's seconds, bare loop's seconds


def run(model: Model, quick: bool) -> list[Row]:
    """Rows for one model."""
    tokens, window = (256, 64) if quick else (3500, 500)
    replies = _replies(model, tokens, quick)
    with closing(model.endless_engine()) as engine:
        with closing(BareLoop(model.path, CONTEXT)) as bare:
            bare.read(engine.tokenize(numbered(1)))
            theirs = _python_ms(lambda: bare.write(tokens))
        ours = _python_ms(lambda: Talk(engine).say(numbered(1), tokens))
        alone = list(map(min, zip(*(_python_alone_ms(engine, tokens) for _ in range(_ALONE)), strict=True)))
    rows = [_against_bare(model, replies), *_python_rows(model, ours, theirs, alone, window)]
    return rows + _against_high_level(model, replies[:2], min(tokens, _HIGH_LEVEL_TOKENS))


def _replies(model: Model, tokens: int, quick: bool) -> list[_Times]:
    """The slices of each reply, in pairs: with the engine loaded first, and with the bare loop."""
    replies: list[_Times] = []
    started = time.perf_counter()
    while not replies or (not quick and (len(replies) < _LEAST or time.perf_counter() - started < _LEAST_S)):
        length = min(tokens, _SHORT) if replies else tokens
        with closing(model.endless_engine()) as engine, closing(BareLoop(model.path, CONTEXT)) as bare:
            replies.append(_interleaved(engine, bare, length))
        with closing(BareLoop(model.path, CONTEXT)) as bare, closing(model.endless_engine()) as engine:
            replies.append(_interleaved(engine, bare, length))
    return replies


class _Slices:
    """The listener to the ledger's text: after every slice it lets the bare loop write as many tokens."""

    def __init__(self, engine: LlamaEngine, bare: BareLoop) -> None:
        self._engine, self._bare = engine, bare
        self._since = 0.0
        self._done = 0
        self.times: _Times = []

    def __call__(self, _: str) -> None:
        now, tokens = time.perf_counter(), self._engine.evaluated_tokens - self._done
        if self._since and tokens < _SLICE:
            return
        if self._since:
            ours, started = now - self._since, time.perf_counter()
            self._bare.write(tokens)
            self.times.append((tokens, ours, time.perf_counter() - started))
        self._done, self._since = self._engine.evaluated_tokens, time.perf_counter()


def _interleaved(engine: LlamaEngine, bare: BareLoop, tokens: int) -> _Times:
    talk = Talk(engine)
    path = [Exchange(Turn(numbered(1)))]
    bare.read(talk.ledger.ids("", path))
    slices = _Slices(engine, bare)
    talk.ledger.reply("", path, 0, Sampling(max_tokens=tokens), 1, slices)
    return slices.times


def _python_ms(write: Callable[[], object]) -> list[float]:
    """Per token that `write` writes, the milliseconds outside of llama.cpp."""
    decoded: list[tuple[float, float]] = []
    sampled: list[tuple[float, float]] = []
    with (
        patch.object(ll, "llama_decode", _timed(ll.llama_decode, decoded)),
        patch.object(ll, "llama_sampler_sample", _timed(ll.llama_sampler_sample, sampled)),
    ):
        write()
    steps = [span for span in decoded if span[0] > sampled[0][0]]  # without the prompt
    return [
        1000 * ((following - sample[0]) - (sample[1] - sample[0]) - (step[1] - step[0]))
        for sample, step, (following, _) in zip(sampled, steps, sampled[1:], strict=False)
    ]


def _python_alone_ms(engine: LlamaEngine, tokens: int) -> list[float]:
    """Per token of a reply that llama.cpp has no part in, milliseconds."""
    times: list[float] = []

    def sample(*_: Any) -> int:
        times.append(time.perf_counter())
        return len(times) % engine.vocabulary.size

    talk = Talk(engine)
    with patch.object(ll, "llama_decode", lambda *_: 0), patch.object(ll, "llama_sampler_sample", sample):
        talk.say(numbered(1), tokens)
    talk.ledger.cache.clear()
    return [1000 * (after - before) for before, after in pairwise(times)]


def _timed(function: Callable[..., Any], spans: list[tuple[float, float]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        spans.append((started, time.perf_counter()))
        return result

    return call


def _against_bare(model: Model, replies: list[_Times]) -> Row:
    tokens, ours, theirs = (sum(column) for column in zip(*chain(*replies[:2]), strict=True))
    ratios = [median(theirs / ours for _, ours, theirs in slices) for slices in replies]
    error = stdev(ratios) / len(ratios) ** 0.5
    return Row(
        f"decode, {model.name}",
        tokens / ours,
        "tokens/s",
        tokens / theirs,
        "bare loop",
        geometric_mean(ratios),
        at_least=0.98,
        note=f"two replies, {tokens} tokens; ratio: mean of {len(ratios)} replies, standard error {error:.3f}",
    )


def _python_rows(model: Model, ours: list[float], bare: list[float], alone: list[float], window: int) -> list[Row]:
    last, name = len(ours), f"Python per token, {model.name}"
    first, end = f"tokens 1 to {window}", f"tokens {last - window + 1} to {last}"
    early, late = median(alone[:window]), median(alone[-window:])
    return [
        Row(name, median(ours), "ms", median(bare), "bare loop", at_most=0.1),
        Row(f"{name}, {end}", median(ours[-window:]), "ms", median(ours[:window]), first, at_most=0.1),
        Row(f"{name}, {end}, without llama.cpp", late, "ms", early, first, late / early, at_most=1.25),
    ]


def _against_high_level(model: Model, replies: list[_Times], tokens: int) -> list[Row]:
    with closing(HighLevel(model.path, CONTEXT)) as peer:
        theirs = peer.complete(rendered([], numbered(1)), tokens)
    if theirs.tokens < tokens // 2:  # a trained model ends its reply, too early to measure
        return []
    done, seconds = 0, 0.0
    for slices in replies:
        ends = accumulate(count for count, *_ in slices)
        for (count, ours, _), end in zip(slices, ends, strict=True):
            if end - count < theirs.tokens:
                done, seconds = done + count, seconds + ours
    rate = done / seconds
    name = f"decode, {model.name}, first {theirs.tokens} tokens"
    note = f"mean of {len(replies)} replies; the Llama class wrote its own some minutes later"
    ratio = rate / theirs.tokens_per_s
    return [Row(name, rate, "tokens/s", theirs.tokens_per_s, "Llama class, stream", ratio, note=note)]
