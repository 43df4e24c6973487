"""HC3 (English): questions that both people and ChatGPT answered."""

from __future__ import annotations

from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from .fields import has_keys, text, texts
from .source import BadRow, Source


def dialogues(row: Any, random: Random) -> list[Dialogue]:
    """One for each answer."""
    question = text(row, "question")
    answers = [*texts(row, "human_answers"), *texts(row, "chatgpt_answers")]
    if not answers:
        raise BadRow("no answers")
    return [Dialogue((Turn(question, answer),)) for answer in answers]


HC3 = Source(
    key="hc3",
    title="HC3 English",
    schema='lines of {"question", "human_answers": [..], "chatgpt_answers": [..]}',
    licence="cc-by-sa-4.0",
    published=87_000,
    files=("all.jsonl",),
    repository="Hello-SimpleAI/HC3",
    fits=has_keys("question", "human_answers", "chatgpt_answers"),
    dialogues=dialogues,
)
