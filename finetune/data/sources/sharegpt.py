"""ShareGPT: conversations with ChatGPT that people shared, as they were copied from its page."""

from __future__ import annotations

from random import Random
from typing import Any

from .fields import Message, Role, has_keys, paired, read_messages
from .source import Source, Trimmed

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_COPY_BUTTON = "\nCopy code\n"  # of the page's code blocks


def messages(row: Any) -> list[Message]:
    """The messages of a row. Raises BadRow."""
    return read_messages(row, "conversations", "from", "value", _ROLES)


def dialogues(row: Any, random: Random) -> list[Trimmed]:
    """The conversation, without the button's text in replies."""
    said = [
        (role, value.replace(_COPY_BUTTON, "\n\n") if role == "assistant" else value) for role, value in messages(row)
    ]
    return [paired(said)]


SHAREGPT = Source(
    key="sharegpt",
    title="ShareGPT",
    schema='an array of {"id", "conversations": [{"from": "human" or "gpt", "value"}]}',
    licence="apache-2.0, by its tag",
    published=30_000,
    files=("ShareGPT_V3_unfiltered_cleaned_split.json",),
    repository="anon8231489123/ShareGPT_Vicuna_unfiltered",
    fits=has_keys("conversations"),
    dialogues=dialogues,
)
