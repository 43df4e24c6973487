"""The prompt as the model gets it: token by token (/tokens) and as text (/template)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from koala_local.chat.conversation import Conversation
from koala_local.chat.ledger import Exchange, Ledger, Piece
from koala_local.dialogue import Control, Dialogue, Reply, Turn
from koala_local.engine.base import Vocabulary
from koala_local.engine.cache import common_prefix
from koala_local.engine.text_stream import plain

SHOWN_TURNS, SHOWN_TOKENS = 2, 400  # of a conversation, unless the user asks for a number of turns
_STYLES = {"control": "magenta", "text": "cyan", "reply": "green"}


def tokens_view(conversation: Conversation, turns: int | None) -> RenderableType:
    """The ledger of the last `turns` turns, coloured by segment; without a number, a few hundred tokens of it."""
    ledger, path, dropped = conversation.ledger, conversation.path(), conversation.dropped
    exchanges = conversation.exchanges(path)
    pieces = ledger.pieces(conversation.system, exchanges, dropped) if path else []
    before = max(0, len(path) - (turns or SHOWN_TURNS))
    start = len(ledger.pieces(conversation.system, exchanges[:before], dropped)) if before > dropped else 0
    shown = [piece for piece in pieces[start:] if piece.ids]
    left_out = sum(len(piece.ids) for piece in pieces[:start])
    if turns is None:
        shown, cut = _last_tokens(shown, SHOWN_TOKENS)
        left_out += cut
    ids = [token for piece in pieces for token in piece.ids]
    cached = common_prefix(ledger.cache.ids, ids)
    lines: list[RenderableType] = [Text(f"... {left_out} tokens before these; /tokens N shows more", "dim")]
    summary = Text(f"{len(ids)} tokens, the first {cached} of them in the KV cache", "dim")
    return Group(*lines[: bool(left_out)], _pieces_table(ledger, shown), summary)


def _last_tokens(pieces: Sequence[Piece], limit: int) -> tuple[list[Piece], int]:
    """The last `limit` tokens of `pieces`, and how many were left out."""
    kept: list[Piece] = []
    room = limit
    for piece in reversed(pieces):
        if room <= 0:
            break
        kept.append(piece._replace(ids=piece.ids[-room:]))
        room -= len(piece.ids)
    return kept[::-1], sum(len(piece.ids) for piece in pieces) - sum(len(piece.ids) for piece in kept)


def _pieces_table(ledger: Ledger, pieces: Sequence[Piece]) -> Table:
    names = _names(ledger.engine.vocabulary)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    for piece in pieces:
        style = _STYLES[piece.kind]
        tokens = Text("|", "dim").join(Text(_token_text(ledger, names, token), style) for token in piece.ids)
        table.add_row(Text(piece.kind, style), Text(str(len(piece.ids)), "dim"), tokens)
    return table


def _names(vocabulary: Vocabulary) -> dict[int, str]:
    """Special tokens by their ids."""
    return {token: plain(text) for text, token in [*vocabulary.user_defined.items(), *vocabulary.control.items()]}


def _token_text(ledger: Ledger, names: dict[int, str], token: int) -> str:
    """What a token stands for, with line ends and bytes that are no text made visible."""
    if token in names:
        return names[token]
    data = ledger.engine.piece(token)
    text = data.decode("utf-8", "replace").replace("\n", "\\n")
    return text if text.isprintable() and "\ufffd" not in text else "".join(f"<0x{byte:02X}>" for byte in data)


def prompt_view(conversation: Conversation) -> RenderableType:
    """The exact text of the prompt, control tokens marked. Before the first turn, that of an example."""
    path, dropped = conversation.exchanges(conversation.path()), conversation.dropped
    example = not path
    path = path or [Exchange(Turn("an example message"))]
    ledger = conversation.ledger
    turns = tuple(exchange.turn for exchange in path[dropped:])
    segments = ledger.format.segments(Dialogue(turns, conversation.system))
    names, text = _names(ledger.engine.vocabulary), Text(overflow="fold")
    for segment, piece in zip(segments, ledger.pieces(conversation.system, path, dropped), strict=False):
        if isinstance(segment, Control):
            content = "".join(_token_text(ledger, names, token) for token in piece.ids)
        else:
            content = " " * (isinstance(segment, Reply) and segment.spaced) + plain(segment.text)
        text.append(content, f"reverse {_STYLES[piece.kind]}" if piece.kind == "control" else _STYLES[piece.kind])
    notes = [Text("(nothing has been said yet: this is an example)", "dim")] if example else []
    return Group(*notes, text)
