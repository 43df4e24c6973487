"""The shape of a conversation: paths and lines in a tree of turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from koala_local.chat.history import Node


@dataclass(frozen=True, slots=True)
class Branch:
    """A line of the conversation: its last turn, and the number to switch to it by."""

    number: int
    last: Node
    turns: int
    current: bool


def path_to(nodes: Mapping[int, Node], head: int | None) -> list[Node]:
    """The turns from the first one to `head`."""
    path: list[Node] = []
    while head is not None:
        path.append(nodes[head])
        head = path[-1].parent
    return path[::-1]


def lines(nodes: Mapping[int, Node], head: int | None) -> list[Branch]:
    """Every line of the tree. A turn goes on with its parent's line where it is the first to do so and no name ends
    that line; else it begins a line. So a line keeps its number whatever comes later."""
    line_of: dict[int | None, int] = {}
    ends: list[int] = []
    ended: set[int | None] = {None}
    for node in sorted(nodes.values(), key=lambda node: (node.id < 0, abs(node.id))):
        if node.parent is None or node.parent in ended or nodes[node.parent].name:
            line_of[node.id] = len(ends)
            ends.append(node.id)
        else:
            line_of[node.id] = line_of[node.parent]
            ends[line_of[node.id]] = node.id
        ended.add(node.parent)
    current = line_of.get(head)
    return [
        Branch(line + 1, nodes[end], len(path_to(nodes, end)), current=line == current) for line, end in enumerate(ends)
    ]
