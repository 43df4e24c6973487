"""What the slash commands need of whoever runs them: the terminal (repl.py) or another program (pipe.py)."""

from __future__ import annotations

from typing import Protocol

from rich.console import RenderableType

from koala_local.chat.conversation import Conversation
from koala_local.chat.ledger import Answer
from koala_local.chat.loader import LoadedModel, LoadOptions
from koala_local.chat.streaming import Act
from koala_local.errors import Interrupted


class Front(Protocol):
    """A conversation with someone to show things to."""

    conversation: Conversation
    model: LoadedModel
    options: LoadOptions
    attachments: list[str]  # what goes in front of the next message, see attach.py
    last: Answer | None  # the last reply of this program run

    def answer(self, act: Act) -> None:
        """Stream the reply that `act` writes, and keep it as `last`. Raises what the writing raises."""

    def show(self, content: RenderableType) -> None:
        """Show a text (no markup in it) or a rich renderable."""

    def ask_text(self, prompt: str, default: str) -> str | None:
        """Let the user change a text. None when they do not want to, or where there is no one to ask."""

    def change_model(self, reference: str) -> None:
        """Go on with another model, and keep it as `model`. Raises KoalaError with the present one still in use."""

    def quit(self) -> None:
        """Leave when this command is done."""


class Unsent(Interrupted):
    """Stopped before the first token, nothing changed. `line` typed again does it again."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line


def say(front: Front, text: str) -> None:
    """Send `text` with what is attached in front of it. Raises KoalaError or Interrupted, still attached then."""
    message = "\n\n".join([*front.attachments, text])
    front.answer(lambda on_text, on_prefill: front.conversation.send(message, on_text, on_prefill))
    front.attachments.clear()
