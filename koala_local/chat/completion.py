"""What Tab completes: commands, and what each of them takes. And the messages of earlier days, for Up and Ctrl-R."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from koala_local.chat.front import Front
from koala_local.dialogue import FORMATS
from koala_local.engine.text_stream import one_line
from koala_local.errors import KoalaError
from koala_local.models.store import known
from koala_local.paths import private_folder

_LONGEST_KEPT = 20_000  # characters of a message; longer ones are pasted files
_LISTED_SESSIONS = 50


class SlashCompleter(Completer):
    """Completes a line that begins with one slash."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._files = PathCompleter(expanduser=True)
        self._models = PathCompleter(expanduser=True, file_filter=lambda name: os.path.isdir(name) or ".gguf" in name)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or line.startswith("//") or "\n" in line:
            return
        name, space, argument = line[1:].partition(" ")
        if space:
            yield from self._arguments(name, argument, complete_event)
        else:
            from koala_local.chat.commands import COMMANDS  # see _begin_idle in repl.py

            for command in COMMANDS.values():
                text = f"{command.name} " if command.usage else command.name
                yield from _match(name, [(text, command.help)])

    def _arguments(self, name: str, argument: str, event: CompleteEvent) -> Iterator[Completion]:
        document = Document(argument, len(argument))
        match name:
            case "attach" | "export":
                yield from self._files.get_completions(document, event)
            case "model":
                yield from _match(argument, _known_models())
                yield from self._models.get_completions(document, event)
            case "template":
                yield from _match(argument, [(name, "") for name in ("auto", "embedded", *FORMATS)])
                yield from self._files.get_completions(document, event)
            case "resume":
                yield from _match(argument, self._sessions())
            case "switch":
                yield from _match(argument, self._branches())
            case "set":
                current = self._front.conversation.sampling
                settings = [(f"{name} ", f"{value:g}") for name, value in current._asdict().items()]
                yield from _match(argument, settings)
            case "help":
                from koala_local.chat.commands import COMMANDS

                yield from _match(argument, [(command.name, command.help) for command in COMMANDS.values()])

    def _sessions(self) -> list[tuple[str, str]]:
        with suppress(KoalaError):
            sessions = self._front.conversation.history.sessions()[:_LISTED_SESSIONS]
            return [(session.id, one_line(session.title, 40)) for session in sessions]
        return []

    def _branches(self) -> list[tuple[str, str]]:
        branches = self._front.conversation.branches()
        return [(b.last.name or str(b.number), one_line(b.last.user, 40)) for b in branches]


def _known_models() -> list[tuple[str, str]]:
    with suppress(OSError):
        return [(model.reference, model.origin) for model in known() if model.runs]
    return []


def _match(typed: str, choices: Iterable[tuple[str, str]]) -> Iterator[Completion]:
    for text, meaning in choices:
        if text.lower().startswith(typed.lower()):
            yield Completion(text, start_position=-len(typed), display=text.strip(), display_meta=meaning)


class _Messages(FileHistory):
    """Messages in a file; commands are remembered for this run only."""

    def store_string(self, string: str) -> None:
        is_command = string.startswith("/") and not string.startswith("//")
        if not is_command and len(string) <= _LONGEST_KEPT:
            with suppress(OSError):  # a full disk must not stop the conversation
                super().store_string(string)


def message_history(folder: Path) -> History:
    """The messages typed so far, kept in `folder` for its owner only; in memory where that cannot be written."""
    path = folder / "messages"
    try:
        private_folder(folder)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return _Messages(str(path))
