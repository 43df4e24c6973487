"""The bar below the prompt: one line of plain text, so that the prompt needs no rich, which takes long to import."""

from __future__ import annotations

from prompt_toolkit.utils import get_cwidth

from koala_local.chat.conversation import Conversation
from koala_local.chat.ledger import Answer
from koala_local.chat.loader import LoadedModel
from koala_local.engine.text_stream import one_line
from koala_local.errors import KoalaError

_METER_CELLS = 6


def bar_fields(model: LoadedModel, conversation: Conversation, last: Answer | None) -> list[tuple[int, str]]:
    """What the bar says, from left to right, each with its rank: the highest one leaves first where room is short."""
    used, size = _context_used(conversation), conversation.ledger.engine.context_size
    filled = min(_METER_CELLS, round(used * _METER_CELLS / size))
    meter = "█" * filled + "░" * (_METER_CELLS - filled)
    fields = [
        (3, one_line(model.name, 24)),
        (5, one_line(conversation.ledger.format.name, 16)),
        (1, f"{used}/{size}"),
        (2, meter),
    ]
    if last:
        fields.append((4, f"{last.stats.tokens_per_s:.0f} tokens/s"))
        fields.append((6, f"reused {last.stats.reused_tokens} of {last.stats.prompt_tokens}"))
    if title := conversation.title:
        fields.append((7, one_line(title, 40)))
    return fields


def bar(fields: list[tuple[int, str]], width: int) -> str:
    """The fields that fit `width` cells, on one line."""
    kept = list(fields)
    while kept:
        line = f" {' · '.join(text for _, text in kept)}".replace(" · █", " █").replace(" · ░", " ░")
        if get_cwidth(line) < width:
            return line
        kept.remove(max(kept))
    return ""


def _context_used(conversation: Conversation) -> int:
    """Tokens that the present line takes in the context."""
    try:
        return len(conversation.prompt_ids())
    except KoalaError:  # a template that fails with this conversation: the next reply will say so
        return len(conversation.ledger.cache.ids)
