"""A model's own chat template (`tokenizer.chat_template`, a Jinja program) as a prompt format.

A template gives one string, in which nobody can tell its own `<|im_end|>` from one that a user typed. So it is rendered
twice: as it is, and with one private-use character in place of each content (system text, user text, reply). What the
second text holds besides these characters is the template's own words, its skeleton, and control tokens are looked for
nowhere else. The first text then shows what the template made of each content: left it alone, trimmed it, or cut
something out, such as the reasoning before an answer. A reply that was left alone keeps its sampled tokens.

Where the two texts cannot be brought together (a template that writes other words depending on what a message says) the
skeleton is right, with the contents put in as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from select import select
from typing import IO, NamedTuple

from koala_local.dialogue import BOS, EOS, FORMATS, Control, Dialogue, Reply, Segment, Text, Turn
from koala_local.engine.text_stream import one_line
from koala_local.errors import TemplateError

SOURCE_CHARACTERS = 1 << 20
RENDER_SECONDS = 2.0
_START_SECONDS = 20.0
_HINT = f"choose another prompt format with --template or /template: {', '.join(FORMATS)}"
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class JinjaFormat:
    """A prompt format written by a Jinja chat template. Starts its worker process at the first rendering."""

    stops: tuple[str, ...] = ()

    def __init__(
        self, source: str, *, name: str, specials: Collection[str], bos_text: str, eos_text: str, add_bos: bool
    ) -> None:
        """`specials` are the texts of all control and user-defined tokens. Raises TemplateError for a source that is
        too large."""
        if len(source) > SOURCE_CHARACTERS:
            raise TemplateError(f"the chat template is larger than {SOURCE_CHARACTERS} characters", _HINT)
        self.name = name
        self.key = f"{name}/{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        self._source = source
        self._bos_text, self._eos_text, self._add_bos = bos_text, eos_text, add_bos
        # `Control` gives the names `bos` and `eos` a meaning of their own
        self._specials = {*specials, bos_text, eos_text} - {"", BOS.text, EOS.text}
        self._used = {special for special in self._specials if special in source}
        self._worker = _Worker()

    @property
    def markers(self) -> tuple[str, ...]:
        """The control tokens that the template's source names, and those that it put together so far."""
        return tuple(sorted(self._used))

    def rendered(self, dialogue: Dialogue) -> str:
        """The exact text the template writes. Raises TemplateError."""
        return self._render(dialogue, [message.content for message in _messages(dialogue)], datetime.now())

    def segments(self, dialogue: Dialogue) -> list[Segment]:
        """The whole dialogue; it ends where the next reply begins, or with what closes the last one. Raises
        TemplateError, also for a template that leaves out the system text or what the user says last."""
        now = datetime.now()
        messages = _messages(dialogue)
        contents = [message.content for message in messages]
        text = self._render(dialogue, contents, now)
        slots = _unused_characters(len(messages) + 1, [self._source, text, *contents])
        end = slots.pop()
        skeleton = self._skeleton(dialogue, slots, now)
        _check_complete(skeleton, dialogue, messages)
        fitted = _fit(text, skeleton, contents, end)
        if fitted is None and dialogue.turns and dialogue.turns[-1].reply is not None:
            prompted = self._prompted_skeleton(skeleton, dialogue, slots, now)
            fitted = _fit(text, prompted, contents, end)
            skeleton = skeleton if fitted is None else prompted
        if fitted is None:
            fitted = [contents[slot] for slot in skeleton.order]
        return self._joined(chain.from_iterable(self._written(skeleton, fitted, messages)))

    def close(self) -> None:
        """End the worker process; a later rendering starts another."""
        self._worker.close()

    def __enter__(self) -> JinjaFormat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self, dialogue: Dialogue, contents: Sequence[str], now: datetime) -> str:
        answer = self._ask(dialogue, contents, now)
        if "text" in answer:
            return answer["text"]
        message = f"the chat template of {one_line(self.name)} fails: {one_line(answer.get('error', ''), 300)}"
        without = replace(dialogue, system="")
        if dialogue.system and "text" in self._ask(without, [m.content for m in _messages(without)], now):
            raise TemplateError(message, f"it takes no system text: leave that out, or {_HINT}")
        raise TemplateError(message, _HINT)

    def _ask(self, dialogue: Dialogue, contents: Sequence[str], now: datetime) -> dict[str, str]:
        """The worker's answer for `dialogue` with `contents` in place of its own."""
        pairs = zip(_messages(dialogue), contents, strict=True)
        variables = {
            "messages": [{"role": message.role, "content": content} for message, content in pairs],
            "add_generation_prompt": bool(dialogue.turns) and dialogue.turns[-1].reply is None,
            "bos_token": self._bos_text,
            "eos_token": self._eos_text,
            "tools": None,
            "documents": None,
        }
        return self._worker.ask({"template": self._source, "variables": variables, "now": now.isoformat()})

    def _skeleton(self, dialogue: Dialogue, slots: Sequence[str], now: datetime) -> _Skeleton:
        parts = re.split(f"([{''.join(slots)}])", self._render(dialogue, slots, now)) if slots else [""]
        return _Skeleton(parts[::2], [slots.index(part) for part in parts[1::2]])

    def _prompted_skeleton(
        self, whole: _Skeleton, dialogue: Dialogue, slots: Sequence[str], now: datetime
    ) -> _Skeleton:
        """The skeleton of a template that writes something of its own before the last reply, such as an empty piece of
        reasoning: there the model's words are all that follows the generation prompt."""
        pending = replace(dialogue, turns=(*dialogue.turns[:-1], replace(dialogue.turns[-1], reply=None)))
        before = self._skeleton(pending, slots[:-1], now)
        return _Skeleton([*before.pieces, whole.pieces[-1]], [*before.order, len(slots) - 1])

    def _written(
        self, skeleton: _Skeleton, fitted: Sequence[str], messages: Sequence[_Message]
    ) -> Iterator[Iterable[Segment]]:
        for piece, slot, text in zip(skeleton.pieces, skeleton.order, fitted, strict=False):
            message = messages[slot]
            if message.turn is None or text != message.content:
                yield [*self._controls(piece), Text(text)]
            elif self._reply_space and piece == self._reply_space:
                yield [*self._controls(piece[:-1]), Reply(message.turn, text, spaced=True)]
            else:
                yield [*self._controls(piece), Reply(message.turn, text, spaced=False)]
        yield self._controls(skeleton.pieces[-1])

    @cached_property
    def _reply_space(self) -> str:
        """What parts a message from its reply where the first space is the model's own to write: the generation prompt
        and that space. Empty where it cannot be told."""
        slot = _unused_characters(1, [self._source])
        with suppress(TemplateError):
            return self._skeleton(Dialogue((Turn(""),)), slot, datetime.now()).pieces[-1] + " "
        return ""

    def _controls(self, piece: str) -> Iterator[Segment]:
        """The template's own words, split at control tokens, the longest first."""
        known = {self._eos_text: EOS}
        if self._add_bos:  # the BOS of a vocabulary that asks for none is a token like any other
            known[self._bos_text] = BOS
        for index, part in enumerate(self._pattern.split(piece) if self._pattern else [piece]):
            if index % 2:
                self._used.add(part)
            yield known.get(part, Control(part)) if index % 2 else Text(part)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def _joined(self, segments: Iterable[Segment]) -> list[Segment]:
        """`segments` with neighbouring texts as one, empty ones left out, and the BOS the vocabulary asks for."""
        joined: list[Segment] = []
        for segment in segments:
            last = joined[-1] if joined else None
            if isinstance(segment, Text) and isinstance(last, Text):
                joined[-1] = Text(last.text + segment.text)
            elif segment != Text(""):
                joined.append(segment)
        return [BOS, *joined] if self._add_bos and joined[:1] != [BOS] else joined


class _Message(NamedTuple):
    """One message as templates know it; `turn` is set for a reply."""

    role: str
    content: str
    turn: int | None = None


class _Skeleton(NamedTuple):
    """A template's own words: `pieces[0]`, then the content numbered `order[0]`, then `pieces[1]`, .. `pieces[-1]`."""

    pieces: Sequence[str]
    order: Sequence[int]


def _messages(dialogue: Dialogue) -> list[_Message]:
    messages = [_Message("system", dialogue.system)] if dialogue.system else []
    for index, turn in enumerate(dialogue.turns):
        messages.append(_Message("user", turn.user))
        if turn.reply is not None:
            messages.append(_Message("assistant", turn.reply, index))
    return messages


def _unused_characters(count: int, texts: Iterable[str]) -> list[str]:
    """`count` private-use characters that occur in none of `texts`."""
    used = set().union(*texts)
    free = (character for character in map(chr, chain(*_PRIVATE_USE)) if character not in used)
    found = list(islice(free, count))
    if len(found) < count:
        raise TemplateError("the conversation leaves no private-use character to render it with", _HINT)
    return found


def _check_complete(skeleton: _Skeleton, dialogue: Dialogue, messages: Sequence[_Message]) -> None:
    """Raise TemplateError where a template silently drops what the model must read."""
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=None)
    if dialogue.system and 0 not in skeleton.order:
        raise TemplateError("the chat template leaves out the system text", f"leave it out yourself, or {_HINT}")
    if last_user is not None and last_user not in skeleton.order:
        raise TemplateError("the chat template leaves out what the user says", _HINT)


def _fit(text: str, skeleton: _Skeleton, contents: Sequence[str], end: str) -> list[str] | None:
    """What the template made of each content in `text`, in the skeleton's order; None where that is open to doubt.
    `end` is a character that occurs nowhere: it makes the last piece unique."""
    text += end
    pieces = [*skeleton.pieces[:-1], skeleton.pieces[-1] + end]
    if not text.startswith(pieces[0]):
        return None
    fitted: list[str] = []
    at = len(pieces[0])
    for slot, piece in zip(skeleton.order, pieces[1:], strict=True):
        found = _found(text, at, contents[slot], piece, last=piece.endswith(end))
        if found is None:
            return None
        fitted.append(found)
        at += len(found) + len(piece)
    return fitted if at == len(text) else None


def _found(text: str, at: int, content: str, piece: str, *, last: bool) -> str | None:
    """What the template made of `content`, which stands in `text` at `at` and is followed by `piece`."""
    for candidate in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(candidate + piece, at):
            return candidate
    end = text.find(piece, at)
    if end < 0 or not piece or piece in content:  # a content that holds the template's words: cut where?
        return None
    part = text[at:end]
    return part if last or part in content else None


class _Worker:
    """The process that renders. One question at a time; killed, and started again at need, when it breaks the rules."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, object]) -> dict[str, str]:
        """The answer to a request, see template_worker.py. Raises TemplateError where none comes in time."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._exchange(json.dumps(request).encode() + b"\n", RENDER_SECONDS)

    def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what a dead process did not read
                pipe.close()  # type: ignore[union-attr]

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        self.close()
        script = Path(__file__).with_name("template_worker.py")
        # -P: imports find nothing in this or the current folder; a session of its own: Ctrl-C is not meant for it
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._exchange(b"", _START_SECONDS)

    def _exchange(self, line: bytes, seconds: float) -> dict[str, str]:
        """Send a line, read one. Whatever goes wrong ends the process: a late answer would meet the next question."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            answer = _read_line(process.stdout, seconds)
        except BaseException:
            self.close()
            raise
        if answer is None or not answer.endswith(b"\n"):
            self.close()
            what = f"takes longer than {seconds:g} seconds" if answer is None else "ends the process that renders it"
            raise TemplateError(f"the chat template {what}", _HINT)
        return dict(json.loads(answer))


def _read_line(pipe: IO[bytes], seconds: float) -> bytes | None:
    """The next line from `pipe`, cut short where the other side died; None when it takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    parts: list[bytes] = []
    while select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        parts.append(os.read(pipe.fileno(), 1 << 20))
        if not parts[-1] or parts[-1].endswith(b"\n"):
            return b"".join(parts)
    return None
