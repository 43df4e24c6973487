"""Turns to save: what the tests of saved conversations share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koala_local.chat.history import History, Node, Session

REPOSITORY = Path(__file__).parents[3]


def begin(history: History, *, model: str = "tiny", format: str = "koala", system: str = "", seed: int = 1) -> Session:
    return history.create(model=model, format=format, system=system, seed=seed)


def say(
    history: History,
    session: Session,
    parent: int | None = None,
    *,
    user: str = "hi",
    reply: str = "hello",
    finish: str = "stop",
    reply_ids: Sequence[int] = (5, 6),
    vocabulary: str = "v",
    attempt: int = 0,
    dropped: int = 0,
    move_head: bool = True,
) -> Node:
    return history.add_turn(
        session.id,
        parent=parent,
        user=user,
        reply=reply,
        finish=finish,
        reply_ids=reply_ids,
        vocabulary=vocabulary,
        attempt=attempt,
        dropped=dropped,
        move_head=move_head,
    )


def filled(folder: Path, turns: int = 30) -> Path:
    """A closed database with one session of long turns."""
    history = History.open(folder)
    session = begin(history)
    parent = None
    for number in range(turns):
        parent = say(history, session, parent, user=f"turn {number} " + "u" * 400, reply_ids=range(300)).id
    history.close()
    return folder / "sessions.db"
