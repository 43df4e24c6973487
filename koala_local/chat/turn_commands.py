"""Slash commands that write replies and walk in the tree of turns. Each gets the front and what follows its name."""

from __future__ import annotations

from koala_local.chat import views
from koala_local.chat.attach import name_of
from koala_local.chat.front import Front, Unsent
from koala_local.chat.saved import Node
from koala_local.dialogue import KOALA
from koala_local.engine.text_stream import one_line
from koala_local.errors import Interrupted, KoalaError

_LONGEST_NAME = 40


def new(front: Front, _: str) -> None:
    front.conversation.new()
    off = ", ".join(map(name_of, front.attachments))
    front.attachments.clear()
    front.last = None
    front.show(f"a new conversation{off and f', without {off}'}; /resume goes back to the one before")


def system(front: Front, text: str) -> None:
    conversation = front.conversation
    if not text:
        front.show(conversation.system or "there is no system text; /system TEXT sets one")
        return
    first = not conversation.system
    conversation.set_system("" if text == "none" else text)
    front.show("the system text is set" if conversation.system else "the system text is gone")
    if first and conversation.system and conversation.ledger.format == KOALA:
        front.show("Koala was trained without a system role: the text goes behind its header, and may be ignored")


def regen(front: Front, _: str) -> None:
    _last(front)
    front.answer(front.conversation.regenerate)


def edit(front: Front, argument: str) -> None:
    _last(front)
    conversation = front.conversation
    number, text = _number_first(argument)
    turns = len(conversation.path())
    number = turns if number is None else number
    if text and not 1 <= number <= turns:
        hint = f"the last one is {turns}; /edit {turns} {one_line(argument, 40)} says all of that there"
        raise KoalaError(f"there is no turn {number}", hint)
    old = conversation.turn(number).user
    changed = text or front.ask_text(f"turn {number} > ", old)
    if changed is None or not changed.strip():
        raise KoalaError("nothing is changed", f"/edit {number} TEXT says something else at turn {number}")
    try:
        front.answer(lambda on_text, on_prefill: conversation.edit(number, changed, on_text, on_prefill))
    except Interrupted:
        raise Unsent(f"/edit {number} {changed}") from None


def undo(front: Front, _: str) -> None:
    _last(front)
    number = len(front.conversation.path())
    gone = front.conversation.undo()
    front.show(f"undone: turn {number}, '{one_line(gone.user, 50)}'; /tree still has it")


def branch(front: Front, argument: str) -> None:
    _last(front)
    conversation = front.conversation
    number, name = _number_first(argument)
    if (name and name[0] in "+-.0123456789") or len(name) > _LONGEST_NAME:
        hint = f"a name begins with no digit, sign or point, and has at most {_LONGEST_NAME} characters"
        raise KoalaError(f"a branch cannot be called {name[:50]}", hint)
    if number is None and not name:
        hint = "/branch N goes on behind turn N, /branch NAME keeps this line"
        raise KoalaError("a turn or a name is missing", hint)
    left = next(branch.number for branch in conversation.branches() if branch.current)
    conversation.branch(number, name)
    turns = len(conversation.path())
    where = f"behind turn {turns}" if turns else "from the beginning"
    back = name or str(left)
    front.show(f"you go on {where}; the line so far is kept, /switch {back} goes back to it")


def switch(front: Front, reference: str) -> None:
    conversation = front.conversation
    if not reference:
        front.show(views.branches_table(conversation.branches()) if conversation.nodes else views.tree(conversation))
        return
    there = conversation.switch(reference)
    name = f" {there.last.name}" if there.last.name else ""
    front.show(f"branch {there.number}{name}, {there.turns} {'turn' if there.turns == 1 else 'turns'}")
    front.show(views.recap(conversation))


def tree(front: Front, _: str) -> None:
    front.show(views.tree(front.conversation))


def _last(front: Front) -> Node:
    """The last turn. Raises KoalaError where nothing has been said."""
    path = front.conversation.path()
    if not path:
        raise KoalaError("nothing has been said yet", "type a message first")
    return path[-1]


def _number_first(argument: str) -> tuple[int | None, str]:
    """`2 some text` is (2, "some text"), `some text` is (None, "some text")."""
    first, *rest = argument.split(maxsplit=1) or [""]
    return (int(first), "".join(rest)) if first.isdecimal() and len(first) < 7 else (None, argument)
