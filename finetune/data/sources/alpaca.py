"""Stanford Alpaca: instructions, some with an input, and text-davinci-003's outputs."""

from __future__ import annotations

from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from .fields import has_keys, text
from .source import Source


def exchange(row: Any) -> Turn:
    """The instruction and its output; an absent input is an empty one. Raises BadRow."""
    given = text(row, "input") if isinstance(row, dict) and row.get("input") is not None else ""
    instruction = text(row, "instruction")
    return Turn(f"{instruction} {given}" if given else instruction, text(row, "output"))


def dialogues(row: Any, random: Random) -> list[Dialogue]:
    return [Dialogue((exchange(row),))]


ALPACA = Source(
    key="alpaca",
    title="Alpaca",
    schema='an array of {"instruction", "input", "output"}',
    licence="cc-by-nc-4.0",
    published=52_000,
    files=("alpaca_data.json",),
    repository="tatsu-lab/alpaca",
    fits=has_keys("instruction", "output"),
    dialogues=dialogues,
    converted=("default/train/0000.parquet",),
)
