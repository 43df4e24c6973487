"""How long the first token takes late in a conversation: turn 30 against turn 2, and against evaluating the whole
history, as a program without a warm cache must. Also against a bare loop that evaluates the same few tokens behind the
same history, which is what llama.cpp itself needs there: attention reads every token before, so that time grows with
the conversation, in a small model far more than in a large one. And against the `Llama` class, which keeps the cache as
far as the re-tokenized prompt has a common prefix with it.

All messages have the same length; the replies are short ones of 12 tokens, as the bundled model writes, and then long
ones of 64. The medians are over several questions asked at the same
place, the cache cut back to the history before each.
"""

from __future__ import annotations

import time
from contextlib import closing
from statistics import median

from benchmarks.models import CONTEXT, Model
from benchmarks.peers import BareLoop, HighLevel
from benchmarks.table import Row
from benchmarks.talk import Talk, numbered, rendered
from koala_local.chat.ledger import Exchange, Stats
from koala_local.dialogue import Turn

_REPLIES = (12, 64)


def run(model: Model, quick: bool) -> list[Row]:
    """Rows for one model."""
    return [row for reply in _REPLIES for row in _run(model, reply, quick)]


def _run(model: Model, reply: int, quick: bool) -> list[Row]:
    last, repeats = (8, 3) if quick else (30, 9)
    with closing(model.endless_engine()) as engine:
        talk = Talk(engine)
        talk.say(numbered(1), reply)
        early = [talk.ask(numbered(90 + ask)) for ask in range(repeats)]
        for turn in range(2, last):
            talk.say(numbered(turn), reply)
        with closing(BareLoop(model.path, CONTEXT)) as bare:
            late, same = _beside_bare(talk, bare, repeats)
        cold = [_cold(talk, numbered(last)) for _ in range(1 if quick else 3)]
    peer = _high_level_ttft(model, talk, last, reply, 1 if quick else 5)
    return _rows(f"{model.name}, replies of {reply}", last, (early, late, cold), same, peer)


def _beside_bare(talk: Talk, bare: BareLoop, repeats: int) -> tuple[list[Stats], list[float]]:
    """Questions in turns with the bare loop: what the ledger says, the bare loop's seconds."""
    history = list(talk.ledger.cache.ids)
    bare.read(history)
    stats, seconds = [], []
    for text in (numbered(90 + ask) for ask in range(repeats)):
        stats.append(talk.ask(text))
        ids = talk.ledger.ids("", [*talk.path, Exchange(Turn(text))])[len(history) :]
        started = time.perf_counter()
        bare.read(ids, keep=len(history))
        bare.sample()
        seconds.append(time.perf_counter() - started)
    return stats, seconds


def _cold(talk: Talk, text: str) -> Stats:
    """The same question with nothing in the cache."""
    talk.ledger.cache.clear()
    return talk.ask(text)


def _high_level_ttft(model: Model, talk: Talk, turn: int, reply: int, repeats: int) -> float:
    """The first token of `turn` from the `Llama` class, which has written the turn before it each time."""
    prompt, seconds = rendered(talk.path[: turn - 2], numbered(turn - 1)), []
    with closing(HighLevel(model.path, CONTEXT)) as peer:
        for seed in range(repeats):
            written = peer.complete(prompt, reply, seed).text
            seconds.append(peer.complete(f"{prompt}{written}</s>USER: {numbered(turn)} GPT:", 2).ttft_s)
    return median(seconds)


def _rows(
    what: str, last: int, stats: tuple[list[Stats], list[Stats], list[Stats]], same: list[float], peer: float
) -> list[Row]:
    second, late, whole = (1000 * median(part.ttft_s for part in parts) for parts in stats)
    before, few, many = (parts[0].evaluated_tokens for parts in stats)
    bare, high = 1000 * median(same), 1000 * peer
    name, counted = f"first token at turn {last}, {what}", f"tokens evaluated at turn {last}, {what}"
    return [
        Row(name, late, "ms", second, "turn 2", late / second, at_most=1.2, note=f"{few} tokens evaluated"),
        Row(name, late, "ms", bare, "the same tokens in a bare loop", late / bare),
        Row(name, late, "ms", whole, "whole history", whole / late, at_least=5, note=f"{many} tokens there"),
        Row(name, late, "ms", high, "Llama class", high / late),
        Row(counted, few, "tokens", before, "turn 2", few / before, at_most=1.0),
    ]
