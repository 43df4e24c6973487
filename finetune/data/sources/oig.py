"""The parts of Open Instruction Generalist that Koala took: four files of LAION's OIG."""

from __future__ import annotations

from random import Random
from typing import Any

from .fields import paired, split_speech, text
from .identity import DESCRIPTION
from .source import Source, Trimmed

_USER, _BOT = "<human>:", "<bot>:"
_ITS_NAME = "OIG (Open Instruction Generalist)"  # said in replies of unified_basic only


def fits(row: Any) -> bool:
    said = row.get("text") if isinstance(row, dict) else None
    return isinstance(said, str) and _USER in said and _BOT in said


def dialogues(row: Any, random: Random) -> list[Trimmed]:
    """The conversation; where the model says its name, it says this model's."""
    said = split_speech(text(row, "text"), _USER, _BOT)
    return [
        paired((role, part.replace(_ITS_NAME, DESCRIPTION) if role == "assistant" else part) for role, part in said)
    ]


OIG = Source(
    key="oig",
    title="OIG",
    schema='lines of {"text": "<human>: ..\\n<bot>: .."}',
    licence="apache-2.0",
    published=30_000,
    files=(
        "unified_grade_school_math_instructions.jsonl",
        "unified_poetry_2_song.jsonl",
        "unified_plot_screenplay_books_dialog.jsonl",
        "unified_basic.jsonl",
    ),
    repository="laion/OIG",
    fits=fits,
    dialogues=dialogues,
)
