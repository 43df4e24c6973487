"""The token ledger: which ids a conversation consists of, and which of them the model still has to read.

Text is the truth of a conversation, token ids are the truth of the cache. A reply keeps the ids that were sampled; only
new text is tokenized. The prompt of any path through the conversation is then a list of ids, and the cache keeps its
longest known prefix: that one rule serves a new turn, regeneration, editing, undo, branches and resumed sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from koala_local.dialogue import BOS, EOS, Control, Dialogue, PromptFormat, Reply, Segment, Text, Turn
from koala_local.engine.base import Engine
from koala_local.engine.cache import PrefixCache, common_prefix
from koala_local.engine.plain_text import PlainText
from koala_local.engine.sampling import Sampling
from koala_local.engine.text_stream import TextStream
from koala_local.errors import ContextError, Interrupted, KoalaError

Overflow = Literal["exact", "shift"]
Finish = Literal["stop", "length", "interrupted"]

# When the context is full, turns leave until this share of it is taken. Re-evaluating what stays then costs, spread
# over the turns until the next overflow, share / (1 - share) evaluations per new token: see benchmarks/overflow.py.
KEEP: dict[Overflow, float] = {"exact": 0.5, "shift": 0.75}
REPLY_ROOM = 0.125  # share of the context that is free for the reply when a turn begins
_SHORTEST = 16  # tokens of a reply that there must be room for
_PROGRESS_STEP = 256  # tokens of prefill between two reports
_PACE_S = 1 / 30  # text is handed on as often: a token of a small model takes a millisecond, and its text none of it


class Exchange(NamedTuple):
    """A turn and the ids that its reply was sampled as; None where they belong to another vocabulary."""

    turn: Turn
    reply_ids: tuple[int, ...] | None = None


class Piece(NamedTuple):
    """The ids of one segment of the prompt."""

    kind: Literal["control", "text", "reply"]
    ids: tuple[int, ...]


class Stats(NamedTuple):
    """What a reply cost. prompt_tokens = reused_tokens + evaluated_tokens: everything before the reply."""

    prompt_tokens: int
    reused_tokens: int
    evaluated_tokens: int
    generated_tokens: int
    ttft_s: float
    tokens_per_s: float
    context_used: int
    context_size: int
    dropped_turns: int  # turns of this conversation that are no longer in the context


class Answer(NamedTuple):
    """A reply with the ids that stand for it."""

    text: str
    ids: tuple[int, ...]
    finish: Finish
    stats: Stats


class Ledger:
    """One conversation at a time, through one engine and one prompt format."""

    def __init__(self, engine: Engine, format: PromptFormat, overflow: Overflow = "exact") -> None:
        self.engine = engine
        self.overflow: Overflow = overflow if engine.can_shift else "exact"
        self.cache = PrefixCache(engine)
        self.use_format(format)

    def use_format(self, format: PromptFormat) -> None:
        """Write prompts in another format from now on; the cache keeps what both have in common."""
        self.format = format
        self._segments = lru_cache(maxsize=8)(format.segments)  # one reply asks for the same prompts again
        self._content = PlainText(self.engine, format.markers)
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}

    def pieces(self, system: str, path: Sequence[Exchange], dropped: int = 0) -> list[Piece]:
        """The token ids of a path without its `dropped` oldest turns, segment by segment."""
        kept = path[dropped:]
        dialogue = Dialogue(tuple(exchange.turn for exchange in kept), system)
        return [self._piece(segment, kept) for segment in self._segments(dialogue)]

    def _piece(self, segment: Segment, kept: Sequence[Exchange]) -> Piece:
        match segment:
            case Control():
                return Piece("control", self._control_ids(segment))
            case Text():
                return Piece("text", self._text_ids(segment.text, continues=False))
            case Reply():
                held = kept[segment.turn].reply_ids
                return Piece("reply", self._reply_ids(segment) if held is None else held)

    def _control_ids(self, control: Control) -> tuple[int, ...]:
        vocabulary = self.engine.vocabulary
        if control == BOS:
            return (vocabulary.bos,) if vocabulary.add_bos and vocabulary.bos is not None else ()
        if control == EOS:
            return (vocabulary.eos,) if vocabulary.eos is not None else ()
        token = vocabulary.control.get(control.text, vocabulary.user_defined.get(control.text))
        # A vocabulary without this token spells it out, as the format's markup was then trained.
        return (token,) if token is not None else tuple(self.engine.tokenize(control.text))

    def _text_ids(self, text: str, *, continues: bool) -> tuple[int, ...]:
        key = (text, continues)
        if key not in self._known:
            self._known[key] = tuple(self._content.ids(text, continues=continues))
        return self._known[key]

    def _reply_ids(self, reply: Reply) -> tuple[int, ...]:
        adds_space = self.engine.vocabulary.adds_space
        if reply.spaced and not adds_space:
            return self._text_ids(f" {reply.text}", continues=False)
        return self._text_ids(reply.text, continues=not reply.spaced)

    def ids(self, system: str, path: Sequence[Exchange], dropped: int = 0) -> list[int]:
        """The token ids of a path as one list."""
        return [token for piece in self.pieces(system, path, dropped) for token in piece.ids]

    def _check_length(self, what: str, text: str) -> None:
        """Refuse a text that cannot fit by its length alone: to tokenize megabytes takes seconds."""
        size = self.engine.context_size
        fewest = len(text) // self.engine.vocabulary.longest
        if fewest > size:
            raise ContextError(
                f"{what} needs more than {fewest} tokens, the context holds {size}",
                "send it in parts, or start with a larger --context",
            )

    def check_system(self, system: str) -> None:
        """Raises ContextError when `system` leaves no room for a conversation."""
        self._check_length("the system text", system)
        needed = len(self.ids(system, [Exchange(Turn(""))]))
        if system and needed > self.engine.context_size // 2:
            raise ContextError(
                f"the system text takes {needed} of the context's {self.engine.context_size} tokens",
                "shorten it to half of the context, or start with a larger --context",
            )

    def reply(
        self,
        system: str,
        path: Sequence[Exchange],
        dropped: int,
        sampling: Sampling,
        seed: int,
        on_text: Callable[[str], None] = lambda _: None,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """Write the reply to the last turn of `path`. The first `dropped` turns have left the context already; more
        leave when it is full (see `Stats.dropped_turns`).

        Raises ContextError when system text and message alone do not fit, Interrupted when stopped before the first
        token. An interrupt later keeps what was written. Either way the cache stays valid.
        """
        self._check_length("the message", path[-1].turn.user)
        return _Writing(self, system, path, dropped, on_text, on_prefill).run(sampling, seed)

    def fit(self, system: str, path: Sequence[Exchange], dropped: int, room: int, least: int) -> int:
        """How many oldest turns must stay away so that the prompt and `room` more tokens fit. Where that is more than
        `dropped`, enough leave at once that the next turns find room as well. Raises ContextError where the last turn
        alone leaves less than `least` of it."""
        size = self.engine.context_size
        if len(self.ids(system, path, dropped)) + room <= size:
            return dropped
        goal = int(size * KEEP[self.overflow])
        while dropped < len(path) - 1:
            dropped += 1
            if len(self.ids(system, path, dropped)) <= min(goal, size - room):
                return dropped
        needed = len(self.ids(system, path, dropped))
        if needed + min(room, least) > size:
            raise ContextError(
                f"the message needs {needed} tokens, the context holds {size}",
                "send it in parts, or start with a larger --context",
            )
        return dropped

    def move_up(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Move the KV of what `new` keeps of `old` into its new place (overflow "shift"; approximate)."""
        self.cache.adopt(old, hold=False)
        held = self.cache.ids
        start = common_prefix(held, new)
        gap = len(old) - len(new)
        if gap > 0 and common_prefix(held[start + gap :], new[start:]) > 0:
            self.cache.shift(start, start + gap)


class _Writing:
    """One reply while it is being written."""

    def __init__(
        self,
        ledger: Ledger,
        system: str,
        path: Sequence[Exchange],
        dropped: int,
        on_text: Callable[[str], None],
        on_prefill: Callable[[int, int], None],
    ) -> None:
        self._ledger, self._cache, self._engine = ledger, ledger.cache, ledger.engine
        self._system, self._path, self._dropped = system, list(path), dropped
        self._on_text, self._on_prefill = on_text, on_prefill
        self._stream = TextStream(ledger.format.stops)
        self._ids: list[int] = []
        self._told = 0  # tokens whose text was handed on
        self._shown = False
        self._spaced, self._closing = self._ending()

    def _with_reply(self, text: str, ids: Sequence[int]) -> list[Exchange]:
        last = self._path[-1].turn
        return [*self._path[:-1], Exchange(replace(last, reply=text), tuple(ids))]

    def _ending(self) -> tuple[bool, int]:
        """Whether the reply's first word carries a space, and how many tokens close the reply."""
        last = replace(self._path[-1].turn, reply="x")
        segments = self._ledger.format.segments(Dialogue((last,), self._system))
        spaced = any(isinstance(segment, Reply) and segment.spaced for segment in segments)
        pieces = self._ledger.pieces(self._system, self._with_reply("x", ()), len(self._path) - 1)
        replies = [index for index, piece in enumerate(pieces) if piece.kind == "reply"]
        after = pieces[replies[-1] + 1 :] if replies else ()
        return spaced, sum(len(piece.ids) for piece in after)

    def run(self, sampling: Sampling, seed: int) -> Answer:
        started = time.perf_counter()
        reused, evaluated = self._read_prompt(sampling)
        sampler = self._engine.sampler(sampling, seed, self._cache.ids)
        try:
            finish, first = self._write(sampler.sample, sampling.max_tokens)
        finally:
            sampler.close()
        decoding = time.perf_counter() - first
        text = self._close(finish)
        count = len(self._ids)
        return Answer(
            text,
            tuple(self._ids),
            finish,
            Stats(
                prompt_tokens=reused + evaluated,
                reused_tokens=reused,
                evaluated_tokens=evaluated,
                generated_tokens=count,
                ttft_s=first - started,
                tokens_per_s=(count - 1) / decoding if count > 1 and decoding > 0 else 0.0,
                context_used=len(self._cache.ids),
                context_size=self._engine.context_size,
                dropped_turns=self._dropped,
            ),
        )

    def _read_prompt(self, sampling: Sampling) -> tuple[int, int]:
        """Evaluate what the cache does not hold of the prompt: (tokens reused, tokens evaluated)."""
        size = self._engine.context_size
        wanted = min(sampling.max_tokens or size, int(size * REPLY_ROOM))
        before = self._dropped
        prompt = self._fit(wanted + self._closing)
        self._cache.adopt(prompt, hold=self._dropped == before)
        self._cache.crop(len(prompt) - 1)  # the logits of the last token are needed anew
        reused = len(self._cache.ids)
        self._evaluate(prompt)
        return reused, len(prompt) - reused

    def _evaluate(self, ids: list[int]) -> None:
        """Extend the cache to all of `ids`."""
        start, total = len(self._cache.ids), len(ids)
        for position in range(start, total, _PROGRESS_STEP):
            self._on_prefill(position - start, total - start)
            self._cache.extend(ids[position : position + _PROGRESS_STEP])

    def _fit(self, room: int) -> list[int]:
        """The prompt, without the turns that leave so that `room` more tokens fit."""
        path = self._path
        dropped = self._ledger.fit(self._system, path, self._dropped, room, self._closing + _SHORTEST)
        prompt = self._ledger.ids(self._system, path, dropped)
        if dropped > self._dropped and self._ledger.overflow == "shift":
            self._ledger.move_up(self._ledger.ids(self._system, path, self._dropped) + self._ids, prompt + self._ids)
        self._dropped = dropped
        return prompt

    def _write(self, sample: Callable[[], int], max_tokens: int) -> tuple[Finish, float]:
        """Sample until the reply ends: (why, when the first token was there)."""
        ends, ids, clock = self._engine.vocabulary.ends, self._ids, time.perf_counter
        pace = 0.0 if self._ledger.format.stops else _PACE_S  # a stop string must be seen at once
        limit = max_tokens or self._engine.context_size
        first = due = 0.0
        try:
            while room := self._room():
                for token in self._cache.generate(sample, room):  # every token pays for what stands here
                    now = clock()
                    first = first or now
                    if token in ends:
                        return "stop", first
                    ids.append(token)
                    if now >= due:
                        due = now + pace
                        if self._tell():
                            return "stop", first
                    if len(ids) >= limit:
                        return "length", first
        except Interrupted:
            return "interrupted", first or time.perf_counter()
        except KoalaError:
            if not self._ids:
                raise
            return "length", first  # what is written is kept
        return "length", first or time.perf_counter()

    def _room(self) -> int:
        """How many more tokens fit besides those that close the reply. Where none does, old turns leave."""
        size = self._engine.context_size - self._closing
        if len(self._cache.ids) >= size and self._dropped < len(self._path) - 1:
            ids = self._fit(len(self._ids) + int(self._engine.context_size * REPLY_ROOM)) + self._ids
            if len(ids) < size:
                self._cache.adopt(ids, hold=False)
                self._evaluate(ids)
        return max(0, size - len(self._cache.ids))

    def _tell(self) -> bool:
        """Hand on the text of the tokens that came since the last time; whether a stop string ends it."""
        new, self._told = self._ids[self._told :], len(self._ids)
        if text := self._stream.feed(b"".join(map(self._engine.piece, new))):
            self._show(text)
        return self._stream.stopped

    def _show(self, text: str) -> None:
        if not self._shown:
            text, self._shown = self._unspaced(text), True
        if text:
            self._on_text(text)

    def _unspaced(self, text: str) -> str:
        """The reply as the user sees it: the space that its first word carries belongs to the format."""
        return text[1:] if self._spaced and text.startswith(" ") else text

    def _close(self, finish: Finish) -> str:
        """End the reply with its end token, evaluated, so that the next turn evaluates only its own text."""
        self._engine.resume()
        self._tell()
        if held := self._stream.finish():
            self._show(held)
        if self._stream.stopped:
            self._rewind_overshoot()
        text = self._unspaced(self._stream.text)
        with suppress(Interrupted, KoalaError):  # less is warm then; the reply is whole
            self._close_cache(text, finish)
        return text

    def _close_cache(self, text: str, finish: Finish) -> None:
        complete = self._ledger.ids(self._system, self._with_reply(text, self._ids), self._dropped)
        missing = len(complete) - self._cache.adopt(complete, hold=False)
        # Who stopped a reply does not wait for a history that is cold: the next turn reads it.
        if finish != "interrupted" or missing <= self._closing + 1:
            self._evaluate(complete)

    def _rewind_overshoot(self) -> None:
        """Keep the ids of the reply up to the stop string; a token that spans its start is tokenized again."""
        kept, data = self._stream.kept_bytes, b""
        for index, token in enumerate(self._ids):
            longer = data + self._engine.piece(token)
            if len(longer) > kept:
                rest = longer[len(data) : kept].decode("utf-8", "replace")
                self._ids[index:] = PlainText(self._engine).ids(rest, continues=True) if rest else []
                return
            data = longer
