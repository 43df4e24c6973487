"""What the slash commands need of whoever runs them: the terminal (repl.py) or another program (pipe.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from koala_local.chat.conversation import Conversation
from koala_local.chat.ledger import Answer, Ledger
from koala_local.chat.loader import LoadedModel, LoadOptions, checked, open_model
from koala_local.chat.streaming import Act
from koala_local.errors import ContextError, Interrupted
from koala_local.models.configuration import refuse_unquantized
from koala_local.models.resolve import resolve

if TYPE_CHECKING:
    from rich.console import RenderableType


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
    try:
        front.answer(lambda on_text, on_prefill: front.conversation.send(message, on_text, on_prefill))
    except ContextError as error:
        off = "; /attach none takes the files off" if front.attachments else ""
        raise ContextError(error.message, error.hint + off) from None
    front.attachments.clear()


def change_model(front: Front, reference: str) -> None:
    """Go on with another model in the same conversation. When it cannot be loaded the current one is loaded again, and
    the error is raised. The file is checked before the current model makes room for it."""
    path, current, conversation = resolve(reference, None), front.model, front.conversation
    if path.is_dir():
        refuse_unquantized(path)
    else:
        checked(path)

    def load(path: Path) -> Ledger:
        front.model = open_model(str(path), None, front.options, conversation.note)
        return front.model.ledger(front.options.overflow)

    conversation.use_model(lambda: load(path), str(path), lambda: load(current.path))
