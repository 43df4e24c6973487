"""Anthropic HH: pairs of dialogues that differ in their last reply, which people compared."""

from __future__ import annotations

from random import Random
from typing import Any

from .fields import has_keys, paired, split_speech, text
from .source import Source, Trimmed

_USER, _ASSISTANT = "Human:", "Assistant:"


def dialogues(row: Any, random: Random) -> list[Trimmed]:
    """The chosen dialogue, and the rejected one with every reply unhelpful."""
    return [_dialogue(text(row, "chosen"), helpful=True), _dialogue(text(row, "rejected"), helpful=False)]


def _dialogue(said: str, helpful: bool) -> Trimmed:
    return paired(split_speech(said, _USER, _ASSISTANT, before=r"(?:\A\s*|\n\n)"), helpful=helpful)


_FOLDERS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")

HH = Source(
    key="hh",
    title="Anthropic HH",
    schema='lines of {"chosen", "rejected"}, each "\\n\\nHuman: ..\\n\\nAssistant: .."',
    licence="mit",
    published=160_000,
    files=tuple(f"{folder}/{part}.jsonl.gz" for folder in _FOLDERS for part in ("train", "test")),
    repository="Anthropic/hh-rlhf",
    fits=has_keys("chosen", "rejected"),
    dialogues=dialogues,
)
