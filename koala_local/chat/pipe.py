"""Chat without a person at the keyboard: one reply to a text, or JSON lines for another program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from koala_local import console
from koala_local.chat.commands import run_line
from koala_local.chat.conversation import Conversation
from koala_local.chat.front import say
from koala_local.chat.ledger import Answer
from koala_local.chat.loader import LoadedModel, LoadOptions
from koala_local.chat.render import ReplyView
from koala_local.chat.streaming import Act, ReplyStream
from koala_local.chat.terminal import on_ctrl_c
from koala_local.errors import Interrupted, KoalaError

_LONGEST_LINE = 64 << 20  # bytes of one request; more is no message but a mistake


def one_reply(conversation: Conversation, text: str) -> None:
    """Write one reply to stdout. Raises Interrupted when stopped, with the partial reply written and saved."""
    stream = ReplyStream(
        conversation.ledger.engine,
        lambda on_text, on_prefill: conversation.send(text, on_text, on_prefill),
        lambda done, total: None,
    )
    notes: list[str] = []
    conversation.note = notes.append  # not into a reply that is being drawn
    with on_ctrl_c(conversation.ledger.engine.interrupt), ReplyView(console.out_console()) as view:
        for chunk in stream:
            view.feed(chunk)
    conversation.note = console.note
    for note in notes:
        console.note(note)
    finish = stream.answer().finish
    if finish == "interrupted":
        raise Interrupted
    if finish == "length":
        console.note("the reply was cut at its longest: see --max-tokens and --context")


def json_lines(conversation: Conversation, model: LoadedModel, options: LoadOptions, text: str | None) -> None:
    """One turn for `text`, or a turn or command for each line of stdin: {"user": ..} or {"command": "/undo"}.

    Each is answered by one line: {"reply", "finish", "stats"}, {"shown"} for what a command shows, {"error", "hint"}.
    """
    front = JsonFront(conversation, model, options)
    if text is not None:
        say(front, text)
        return
    for request in _requests():
        try:
            _serve(front, request)
        except KoalaError as error:
            console.json_line({"error": error.message, "hint": error.hint})
        except Interrupted:
            console.json_line({"error": "interrupted before the first token", "hint": "send the message again"})
        if front.done:
            return


def _requests() -> Iterator[bytes]:
    while line := sys.stdin.buffer.readline(_LONGEST_LINE + 1):
        rest = line
        while len(rest) > _LONGEST_LINE and not rest.endswith(b"\n"):  # one line, one answer
            rest = sys.stdin.buffer.readline(_LONGEST_LINE + 1)
        if line.strip():
            yield line


def _serve(front: JsonFront, line: bytes) -> None:
    match _parse(line):
        case {"user": str(text), **others} if text.strip() and not others:
            say(front, text)
        case {"command": str(command), **others} if not others:
            front.command(command)
        case {"user": str(), **others} | {"command": str(), **others} if others:
            raise KoalaError(f"the line has a key too many: {str(next(iter(others)))[:40]!r}", "user or command alone")
        case {"user": str()}:
            raise KoalaError("the message is empty", 'send {"user": "text"}')
        case _:
            raise KoalaError("the line is no request", 'send {"user": "text"} or {"command": "/help"}')


def _parse(line: bytes) -> Any:
    if len(line) > _LONGEST_LINE:
        raise KoalaError(f"the line is longer than {_LONGEST_LINE >> 20} MiB", "send less text at a time")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise KoalaError(f"the line is not JSON: {error}", "send one JSON object a line, in UTF-8") from None


class JsonFront:
    """What the slash commands act on when a program sends them. Satisfies `Front`."""

    def __init__(self, conversation: Conversation, model: LoadedModel, options: LoadOptions) -> None:
        self.conversation, self.model, self.options = conversation, model, options
        self.attachments: list[str] = []
        self.done = False
        self._shown: list[str] | None = None
        self.last: Answer | None = None

    def command(self, line: str) -> None:
        """Run one slash command; what it shows is one line of output, as is a reply it asks for."""
        self._shown = []
        run_line(self, line)
        if self._shown is not None:
            console.json_line({"shown": "\n".join(line.rstrip() for line in "\n".join(self._shown).splitlines())})

    def answer(self, act: Act) -> None:
        stream = ReplyStream(self.conversation.ledger.engine, act, lambda done, total: None)
        with on_ctrl_c(self.conversation.ledger.engine.interrupt):
            for _ in stream:
                pass
        self.last = answer = stream.answer()
        self._shown = None  # the reply is the answer to the command
        console.json_line({"reply": answer.text, "finish": answer.finish, "stats": answer.stats._asdict()})

    def show(self, content: object) -> None:
        if self._shown is not None:
            self._shown.append(console.as_text(content))

    def ask_text(self, prompt: str, default: str) -> str | None:
        return None

    def quit(self) -> None:
        self.done = True
