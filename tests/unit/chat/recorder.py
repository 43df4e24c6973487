"""A front for the tests of the slash commands: it keeps what it is shown, and checks it."""

from __future__ import annotations

import io

from rich.cells import cell_len
from rich.console import Console, RenderableType

from koala_local.chat.commands import run_line
from koala_local.chat.conversation import Conversation
from koala_local.chat.ledger import Answer
from koala_local.chat.loader import LoadedModel, LoadOptions
from koala_local.chat.streaming import Act
from koala_local.engine.text_stream import plain
from koala_local.errors import Interrupted

WIDTH = 40


class Recorder:
    """Satisfies `Front`. Whatever it is shown must fit 40 columns and have no terminal escapes."""

    def __init__(self, conversation: Conversation, model: LoadedModel) -> None:
        self.conversation, self.model, self.options = conversation, model, LoadOptions()
        self.attachments: list[str] = []
        self.last: Answer | None = None
        self.shown: list[str] = []
        self.replacement: str | None = None  # what the user makes of a text that they are asked to change
        self.asked = ""
        self.interrupted = self.done = False

    def answer(self, act: Act) -> None:
        if self.interrupted:
            raise Interrupted
        self.last = act(lambda text: None, lambda done, total: None)

    def show(self, content: RenderableType) -> None:
        if isinstance(content, str):
            self.shown.append(plain(content))  # as both fronts do
            return
        page = io.StringIO()
        Console(file=page, width=WIDTH, color_system=None, force_terminal=False).print(content)
        assert "\x1b" not in page.getvalue()
        assert max(map(cell_len, page.getvalue().splitlines())) <= WIDTH
        self.shown.append(page.getvalue())

    def ask_text(self, prompt: str, default: str) -> str | None:
        self.asked = default
        return self.replacement

    def quit(self) -> None:
        self.done = True

    def run(self, line: str) -> str:
        """Run a line and return what it showed."""
        self.shown = []
        run_line(self, line)
        return "\n".join(self.shown)


def users(front: Recorder) -> list[str]:
    return [node.user for node in front.conversation.path()]
