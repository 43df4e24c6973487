"""Who the model is: questions and answers written for this project, in `identity.json` beside this file.

A row holds questions and answers, each of which fits each; `{name}` in a question stands for each of its names.
"""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from .fields import has_keys, texts
from .source import Source

DESCRIPTION = "Koala, a dialogue model fine-tuned from LLaMA"


def dialogues(row: Any, random: Random) -> list[Dialogue]:
    """Every question with every answer."""
    forms, answers = texts(row, "questions"), texts(row, "answers")
    names = texts(row, "names") if "names" in row else [""]
    questions = [form.replace("{name}", name) for form, name in product(forms, names)]
    return [Dialogue((Turn(question, answer),)) for question, answer in product(questions, answers)]


IDENTITY = Source(
    key="identity",
    title="identity",
    schema='an array of {"questions": [..], "names"?: [..], "answers": [..]}',
    licence="this project's",
    published=850,
    files=("identity.json",),
    repository="",
    fits=has_keys("questions", "answers"),
    dialogues=dialogues,
)
