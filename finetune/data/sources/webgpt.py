"""WebGPT comparisons: pairs of answers to a question, each with the quotes it rests on, that people compared."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from .fields import field, has_keys, text, texts
from .source import BadRow, Source

LEAD_INS = (
    "Answer with the help of these sources: ",
    "Here are some sources for your answer: ",
    "Base your answer on these sources: ",
    "These sources may be of use: ",
    "Rely on the sources that follow and name them: ",
    "I found these pages on it: ",
    "Please cite these sources where they help: ",
    "Sources: ",
)


def dialogues(row: Any, random: Random) -> list[Dialogue]:
    """The better answer, and the other as an unhelpful one, each behind its own quotes."""
    difference = _score(row, "score_0") - _score(row, "score_1")
    if difference == 0:
        raise BadRow("a tie")
    better = 0 if difference > 0 else 1
    return [_answer(row, better, random, helpful=True), _answer(row, 1 - better, random, helpful=False)]


def _answer(row: Any, number: int, random: Random, helpful: bool) -> Dialogue:
    question = text(field(row, "question"), "full_text")
    quotes = _quotes(field(row, f"quotes_{number}"), random)
    asked = f"{question} {quotes}" if quotes else question
    return Dialogue((Turn(asked, text(row, f"answer_{number}"), helpful),))


def _quotes(quotes: Any, random: Random) -> str:
    titles, extracts = texts(quotes, "title"), texts(quotes, "extract")
    if len(titles) != len(extracts):
        raise BadRow("quotes without their titles")
    if not titles:
        return ""
    listed = enumerate(zip(titles, extracts, strict=True), start=1)
    return random.choice(LEAD_INS) + "".join(f"[{n}] title: {title} content: {said} " for n, (title, said) in listed)


def _score(row: Any, key: str) -> float:
    value = field(row, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"{key!r} is no number")
    return value


WEBGPT = Source(
    key="webgpt",
    title="WebGPT comparisons",
    schema='lines of {"question": {"full_text"}, "quotes_0": {"title": [..], "extract": [..]}, "answer_0", "score_0", '
    '"quotes_1", "answer_1", "score_1"}',
    licence="none stated",
    published=20_000,
    files=("comparisons.jsonl",),
    repository="openai/webgpt_comparisons",
    fits=has_keys("question", "quotes_0", "answer_0", "score_0", "quotes_1", "answer_1", "score_1"),
    dialogues=dialogues,
    converted=("default/train/0000.parquet",),
)
