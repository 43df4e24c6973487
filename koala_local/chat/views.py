"""What the slash commands show of a conversation. Everything fits 40 columns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from koala_local.chat.conversation import Conversation
from koala_local.chat.ledger import Answer
from koala_local.chat.loader import LoadedModel
from koala_local.chat.saved import Branch, Node, SessionSummary
from koala_local.engine.sampling import Sampling
from koala_local.engine.text_stream import one_line, plain

_RECAP_CHARACTERS = 600
_DEEPEST_FORK = 5  # levels of indentation; what forks deeper is drawn at the same level


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(plain(value)))
    return table


def model_table(model: LoadedModel) -> RenderableType:
    engine = model.engine
    return pairs(
        [
            ("model", model.name),
            ("file", str(model.path)),
            ("size", model.summary),
            ("context", f"{engine.context_size} tokens (trained on {engine.trained_context})"),
            ("placed", engine.placed),
            ("format", f"{model.format.name}: {model.format_reason}"),
            *([("licence", model.licence_notice())] if model.licence_notice() else []),
        ]
    )


def sampling_table(sampling: Sampling) -> RenderableType:
    return pairs((name, f"{value:g}") for name, value in sampling._asdict().items())


_ENDED = {"stop": "ended by the model", "length": "cut at its longest", "interrupted": "stopped by you"}


def stats_table(conversation: Conversation, last: Answer | None) -> RenderableType:
    """What the last reply cost, and what the cache holds."""
    rows: list[tuple[str, str]] = []
    if last:
        stats = last.stats
        rows = [
            ("reply", f"{stats.generated_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, {_ENDED[last.finish]}"),
            ("first token", f"after {stats.ttft_s * 1000:.0f} ms"),
            (
                "prompt",
                f"{stats.prompt_tokens} tokens: {stats.reused_tokens} reused, {stats.evaluated_tokens} evaluated",
            ),
        ]
    ledger, dropped, used = conversation.ledger, conversation.dropped, len(conversation.prompt_ids())
    size, held = ledger.engine.context_size, ledger.cache.held
    rows += [
        ("context", f"{used} of {size} tokens"),
        ("dropped", f"{dropped} {'turn has' if dropped == 1 else 'turns have'} left the context"),
        ("KV cache", f"{ledger.cache.used_cells} of {size} cells"),
        ("held", f"{held} other {'branch' if held == 1 else 'branches'}"),
        ("evaluated", f"{ledger.engine.evaluated_tokens} tokens since the model was loaded"),
        ("overflow", ledger.overflow),
    ]
    return pairs(rows)


def recap(conversation: Conversation) -> RenderableType:
    """The last turn, shortened: where the conversation stands."""
    path = conversation.path()
    if not path:
        return Text("nothing has been said on this line yet", "dim")
    reply = plain(path[-1].reply)
    shortened = f"…{reply[-_RECAP_CHARACTERS:].lstrip()}" if len(reply) > _RECAP_CHARACTERS else reply
    return Group(Text(f"> {one_line(path[-1].user, 300)}", "dim"), Text(), Text(shortened or "(an empty reply)"))


def sessions_table(sessions: Sequence[SessionSummary], current: str | None) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for session in sessions:
        style = "bold" if session.id == current else ""
        row = (session.id, _ago(session.updated), f"{session.turns}", one_line(session.title))
        table.add_row(*(Text(cell, style) for cell in row))
    return Group(Text("id, last used, turns, title", "dim"), table)


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for length, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f} {letter}"
    return "now"


def branches_table(branches: Sequence[Branch]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for branch in branches:
        name = f"{plain(branch.last.name)}: " if branch.last.name else ""
        mark = "*" if branch.current else " "
        row = (f"{mark} {branch.number}", f"{branch.turns}", f"{name}{one_line(branch.last.user)}")
        table.add_row(*(Text(cell, "bold" if branch.current else "") for cell in row))
    return Group(Text("branch, turns, last message", "dim"), table)


def tree(conversation: Conversation) -> RenderableType:
    """Every turn. At a fork the line you are on stands last and goes on straight below; the others are indented."""
    on_path = {node.id for node in conversation.path()}
    children: defaultdict[int | None, list[Node]] = defaultdict(list)
    for node in conversation.nodes.values():
        children[node.parent].append(node)
    if not children:
        return Text("nothing has been said yet", "dim")
    root = Tree(Text(conversation.title, "bold", no_wrap=True, overflow="ellipsis"), guide_style="dim")
    label = _labels(conversation)
    pending: list[tuple[Node, Tree, int, int, bool]] = []

    def follow(parent: int | None, branch: Tree, turn: int, depth: int) -> None:
        below = sorted(children[parent], key=lambda node: node.id in on_path)
        pending.extend((node, branch, turn, depth, node is not below[-1]) for node in reversed(below))

    follow(None, root, 1, 0)
    while pending:
        node, branch, turn, depth, indents = pending.pop()
        twig = branch.add(label(node, turn))
        if indents and depth < _DEEPEST_FORK:
            follow(node.id, twig, turn + 1, depth + 1)
        else:
            follow(node.id, branch, turn + 1, depth)
    return Group(root, Text("* the line you are on, > where you are, [number] for /switch", "dim"))


def _labels(conversation: Conversation) -> Callable[[Node, int], Text]:
    path = {node.id for node in conversation.path()}
    ends = {branch.last.id: branch for branch in conversation.branches()}

    def label(node: Node, turn: int) -> Text:
        mark = ">" if node.id == conversation.head else "*" if node.id in path else " "
        text = Text(f"{mark} {turn} ", "bold" if node.id in path else "", no_wrap=True, overflow="ellipsis")
        if branch := ends.get(node.id):
            text.append(f"[{branch.number}{' ' * bool(node.name)}{plain(node.name)}] ", "cyan")
        return text.append(f"{one_line(node.user, 28)} -> ").append(one_line(node.reply, 120), "dim")

    return label
