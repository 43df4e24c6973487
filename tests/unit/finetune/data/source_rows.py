"""Raw rows of every source, what is read of them, and real rows with the ids that the original code made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from koala_local.finetune.data.examples import Example
from koala_local.finetune.data.raw_files import rows
from koala_local.finetune.data.sources import OWN, SOURCES, Skipped, Source, read_source

from koala_local.dialogue import Dialogue

HUMAN_GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def read(source: Source, found: list[Any], tmp_path: Path, seed: int = 1) -> list[Example | Skipped]:
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return list(read_source(source, [path], seed))


def dialogues(key: str, row: Any, tmp_path: Path) -> list[Dialogue]:
    source = {**SOURCES, "own": OWN}[key]
    found = read(source, [row], tmp_path)
    assert all(isinstance(each, Example) and (each.source, each.row) == (key, "raw.jsonl:1") for each in found), found
    return spoken(found)


def spoken(found: Iterable[Example | Skipped]) -> list[Dialogue]:
    """The dialogues among what was read."""
    read = [each.content for each in found if isinstance(each, Example)]
    return [content for content in read if isinstance(content, Dialogue)]


def comparison(**changes: Any) -> dict[str, Any]:
    quotes = {"title": ["A page", "Another"], "extract": ["It is so.", "It is not."]}
    row = {
        "question": {"dataset": "x", "id": "1", "full_text": "Is it so?"},
        "quotes_0": quotes,
        "answer_0": "Yes [1].",
        "tokens_0": {},
        "score_0": 0.5,
        "quotes_1": {"title": [], "extract": []},
        "answer_1": "No.",
        "score_1": -0.5,
    }
    return {**row, **changes}


def summaries(**changes: Any) -> dict[str, Any]:
    row = {"info": {"id": "1", "post": "A long post."}, "summaries": [{"text": " A."}, {"text": "B."}], "choice": 1}
    return {**row, **changes}


GOOD: dict[str, Any] = {
    "sharegpt": {"id": "1", "conversations": HUMAN_GPT},
    "hc3": {"question": "Why?", "human_answers": ["So."], "chatgpt_answers": ["Because."], "index": 1, "source": "x"},
    "oig": {"text": "<human>: Hi\n<bot>: Hello", "metadata": {"source": "unified_basic"}},
    "alpaca": {"instruction": "Add", "input": "1, 2", "output": "3"},
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
    "webgpt": comparison(),
    "summarization": summaries(),
    "identity": {"questions": ["Who?"], "answers": ["Koala."]},
    "own": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
}


DATA = Path(os.environ.get("KOALA_TEST_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(
    not (DATA / "vectors/koala_tokens.jsonl").is_file(), reason="KOALA_TEST_DATA names no folder with vectors"
)
VECTORS = {  # by source, as the file of vectors calls it: the source here, and the file of its rows
    "alpaca": ("alpaca", "alpaca_data.json.xz"),
    "sharegpt_sample": ("sharegpt", "sharegpt_sample.json.xz"),
    "hh_harmless_base_test": ("hh", "hh_harmless_base_test.jsonl.gz"),
    "hh_helpful_base_recovered": ("hh", "hh_helpful_base_recovered.jsonl.xz"),
}


def vectors(stem: str) -> list[tuple[Dialogue, list[int], list[int]]]:
    """The dialogues of the file's rows that have vectors, each with its ids and its mask by the original code."""
    with (DATA / "vectors/koala_tokens.jsonl").open(encoding="utf-8") as file:
        wanted = [vector for vector in map(json.loads, file) if vector["source"] == stem]
    key, name = VECTORS[stem]
    path = DATA / "dialogue" / name
    numbers = {number: row[0] for number, row in enumerate(rows(path)) if not isinstance(row, Skipped)}
    named = {numbers[vector["row"]] for vector in wanted}
    made = [
        each for each in read_source(SOURCES[key], [path], seed=1) if isinstance(each, Example) and each.row in named
    ]
    found = []
    for vector in wanted:
        of_row = spoken(each for each in made if each.row == numbers[vector["row"]])
        (dialogue,) = [each for each in of_row if each.turns[0].helpful == (vector["part"] != "rejected")]
        found.append((dialogue, vector["ids"], vector["mask"]))
    return found
