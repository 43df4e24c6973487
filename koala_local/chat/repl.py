"""The conversation in a terminal: a prompt that edits like a shell's, replies that stream, commands with a slash."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import cached_property
from importlib import import_module
from queue import SimpleQueue
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import is_dumb_terminal

from koala_local import console, nano
from koala_local.chat.bar import bar, bar_fields
from koala_local.chat.completion import SlashCompleter, message_history
from koala_local.chat.conversation import Conversation
from koala_local.chat.front import Unsent, say
from koala_local.chat.ledger import Answer
from koala_local.chat.loader import LoadedModel, LoadOptions
from koala_local.chat.streaming import Act, ReplyStream
from koala_local.chat.terminal import flush_keys, on_ctrl_c, raise_interrupt
from koala_local.engine.text_stream import one_line, plain
from koala_local.errors import ContextError, Interrupted, KoalaError
from koala_local.paths import data_folder

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

IDLE_S = 10.0  # without a key for so long, the KV cache is saved
_PROMPT = "> "
_LONG = 1000  # characters of a message
_STYLE = Style.from_dict({"prompt": "bold", "bottom-toolbar": "noreverse dim"})


class Repl:
    """One person at a terminal. Satisfies `Front`."""

    def __init__(self, conversation: Conversation, model: LoadedModel, options: LoadOptions) -> None:
        self.conversation, self.model, self.options = conversation, model, options
        self.attachments: list[str] = []
        self.last: Answer | None = None
        self._notes: SimpleQueue[str] = SimpleQueue()
        self.conversation.note = self._notes.put  # it may speak while a reply is drawn, or from another thread
        self._engine_free = threading.Lock()
        self._dumb = is_dumb_terminal()
        self._done = self._leaving = False
        self._typed = ""  # what the next prompt begins with
        self._last_key = 0.0
        self._bar: list[tuple[int, str]] = []

    def run(self) -> None:
        """Talk until the user leaves."""
        with on_ctrl_c(lambda: None):  # heard where something can be stopped; half a command leaves nothing sound
            self._banner()
            while not self._done:
                line = self._read()
                if line.strip():
                    self._take(line.rstrip())

    # -- as the commands see it

    def answer(self, act: Act) -> None:
        from koala_local.chat.render import PrefillLine, ReplyView  # see _begin_idle

        engine = self.conversation.ledger.engine
        progress = PrefillLine(self._console)
        stream = ReplyStream(engine, act, progress.update)
        with on_ctrl_c(engine.interrupt), ReplyView(self._console) as view:
            try:
                for text in stream:
                    progress.stop()
                    view.feed(text)
            finally:
                progress.stop()
        self.last = stream.answer()
        self._tell_end(self.last)

    def show(self, content: RenderableType) -> None:
        self._console.print(plain(content) if isinstance(content, str) else content)

    def ask_text(self, prompt: str, default: str) -> str | None:
        try:
            if self._dumb:
                return self._read_dumb(f"{plain(default)}\n{prompt}")
            asking: PromptSession[str] = PromptSession(multiline=True, key_bindings=_sending_keys(), style=_STYLE)
            return asking.prompt([("class:prompt", prompt)], default=default)
        except (KeyboardInterrupt, EOFError):
            return None

    def quit(self) -> None:
        self._done = True

    # -- reading

    @cached_property
    def _console(self) -> Console:
        return console.out_console()

    @cached_property
    def _prompt(self) -> PromptSession[str]:
        prompt: PromptSession[str] = PromptSession(
            [("class:prompt", _PROMPT)],
            multiline=True,
            prompt_continuation=" " * len(_PROMPT),
            key_bindings=self._keys(),
            history=message_history(data_folder()),
            completer=SlashCompleter(self),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            bottom_toolbar=lambda: bar(self._bar, get_app().output.get_size().columns),
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            style=_STYLE,
        )
        prompt.default_buffer.on_text_changed += lambda _: self._key_pressed()
        return prompt

    def _keys(self) -> KeyBindings:
        keys = _sending_keys()

        @keys.add("c-c", filter=has_focus(DEFAULT_BUFFER))
        def _clear_or_leave(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.erase_when_done = True
                event.app.exit(exception=KeyboardInterrupt)

        return keys

    def _key_pressed(self) -> None:
        self._last_key = time.monotonic()
        self._leaving = False

    def _read(self) -> str:
        """What the user sends; "" where nothing is to be done, or the user leaves."""
        typed, self._typed = self._typed, ""
        try:
            if self._dumb:
                text = self._read_dumb(f"not sent: {plain(typed)}\n{_PROMPT}" if typed else _PROMPT)
            else:
                text = self._read_line(typed)
        except KeyboardInterrupt:
            self._done, self._leaving = self._leaving, True
            if not self._done:
                console.styled("Ctrl-C again leaves, as does Ctrl-D", dim=True)
            return ""
        except EOFError:
            self._done = True
            return ""
        self._leaving = False
        return text

    def _read_line(self, typed: str) -> str:
        self._bar = bar_fields(self.model, self.conversation, self.last)
        self._last_key = time.monotonic()
        self._prompt.app.erase_when_done = False
        return self._prompt.prompt(default=typed, pre_run=self._begin_idle)

    def _read_dumb(self, prompt: str) -> str:
        """A terminal that cannot move its cursor edits the line itself."""
        with on_ctrl_c(raise_interrupt):
            try:
                return input(prompt)
            except (KeyboardInterrupt, EOFError):
                self.show("")
                raise

    def _begin_idle(self) -> None:
        """What is left to do behind the prompt: code that only a reply needs is imported while the user types."""
        asyncio.get_running_loop().run_in_executor(None, _import_rest)
        get_app().create_background_task(self._save_when_idle())

    async def _save_when_idle(self) -> None:
        """Save the KV cache while nobody types. The prompt stays as it is; leaving it waits for the save to end."""
        while (quiet := time.monotonic() - self._last_key) < IDLE_S:
            await asyncio.sleep(IDLE_S - quiet)
        await asyncio.get_running_loop().run_in_executor(None, self._save)
        if not self._notes.empty():
            await run_in_terminal(self._tell_notes)

    def _save(self) -> None:
        with self._engine_free:
            self.conversation.save()

    # -- doing

    def _take(self, line: str) -> None:
        """Send a message or run a command. Whatever goes wrong is told, and the conversation goes on."""
        try:
            with self._engine_free:
                if line.startswith("/"):
                    from koala_local.chat.commands import run_line

                    run_line(self, line)
                else:
                    say(self, line)
        except Interrupted as stop:
            flush_keys()  # what was typed meanwhile would be appended
            self._typed = stop.line if isinstance(stop, Unsent) else line
            console.styled("stopped before the first token: nothing is sent", dim=True)
        except KoalaError as error:
            unsent = isinstance(error, ContextError)
            # A message that fills the screen again would hide the error above it.
            hides = unsent and len(line) > _LONG and not self._dumb
            self._typed = line if unsent and not hides else ""
            self._complain(error.message, error.hint + ("; arrow up brings the message back" if hides else ""))
        except Exception as error:  # a defect in one command must not take the conversation with it
            self._complain(f"internal error: {type(error).__name__}: {error}", "please report it; you can go on")
        self._tell_notes()
        if not self._done:
            self.show("")

    def _complain(self, message: str, hint: str) -> None:
        console.styled(one_line(message, 1000), fg="red")
        if hint:
            console.styled(one_line(hint, 1000), dim=True)

    def _tell_notes(self) -> None:
        while not self._notes.empty():
            console.styled(one_line(self._notes.get(), 1000), fg="yellow")

    def _tell_end(self, answer: Answer) -> None:
        limit = self.conversation.sampling.max_tokens
        if answer.finish == "interrupted":
            console.styled("stopped; what is written is kept", dim=True)
        elif answer.finish == "length" and limit and answer.stats.generated_tokens >= limit:
            console.styled(f"cut at {limit} tokens: /set max_tokens changes that", dim=True)
        elif answer.finish == "length":
            console.styled("cut: the context is full with this turn alone", dim=True)
        elif not answer.text.strip():
            console.styled("an empty reply; /regen tries again", dim=True)

    def _banner(self) -> None:
        model, engine = self.model, self.conversation.ledger.engine
        format, reason = self.conversation.ledger.format.name, model.format_reason
        console.styled(one_line(model.name, 60), bold=True)
        console.styled(model.summary, dim=True)
        console.styled(f"context {engine.context_size} tokens, prompt format {format} ({reason})", dim=True)
        if model.path.resolve() == nano.MODEL_PATH.resolve():
            console.styled("This is the bundled miniature. For a real model: koala chat koala-13b")
        if notice := model.licence_notice():
            console.styled(notice, fg="yellow")
        self._tell_notes()
        console.styled("/help lists the commands", dim=True)
        console.styled("")
        if self.conversation.path():
            from koala_local.chat.views import recap

            self.show(recap(self.conversation))
            self.show("")


def _import_rest() -> None:
    """What only a reply or a command needs."""
    for name in ("commands", "render"):
        import_module(f"koala_local.chat.{name}")


def _sending_keys() -> KeyBindings:
    """Enter sends; Alt-Enter and Ctrl-J begin a new line."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
