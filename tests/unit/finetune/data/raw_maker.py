"""Small raw files in the published formats, written for the tests, with something of each kind that is left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

from tests.checkpoint_maker import tokenizer_model

GERMAN = "Wie koche ich ein Ei so, dass der Dotter weich bleibt und das Eiweiß fest wird, und wie lange dauert das?"
TESTED = "Name three birds that live on a lake and say what each of them eats."
STORY = "write a short story about a fox who learns to count the stars above the old mill by the river at night"
RECIPE = """
seed = 3
[sources.sharegpt]
english = true
duplicates = "near"
keywords = ["openai"]
[sources.hc3]
[sources.alpaca]
duplicates = "exact"
[sources.hh]
[sources.notes]
files = ["notes.jsonl"]
weight = 2.0
"""
_WORDS = ("river", "mill", "fox", "hen", "lake", "bird", "star", "night", "bread", "butter", "stone", "wind", "road")


def sentence(random: Random, length: int = 12) -> str:
    return " ".join(random.choices(_WORDS, k=length))


def conversation(*said: str) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(said)
    return {"id": "x", "conversations": [{"from": f, "value": v} for f, v in zip(speakers, said, strict=False)]}


def sharegpt(random: Random, plain: int) -> list[dict[str, Any]]:
    """`plain` conversations that stay, and one that leaves for each reason: see `LEAVES`."""
    rows = [conversation(sentence(random), sentence(random), sentence(random), sentence(random)) for _ in range(plain)]
    return [
        *rows,
        conversation(STORY, "Once upon a time."),
        conversation(f"Please {STORY}", "There was a fox."),  # near
        conversation(STORY.upper(), "Again?"),  # exact
        conversation("Who made you?", "I am made by OpenAI."),  # keyword
        conversation(GERMAN, "Fünf Minuten."),  # language
        conversation("Hello!", "Hi.", TESTED, "Ducks, swans and herons."),  # contaminated
        conversation("A question without an answer"),  # skipped
    ]


def make_raw(folder: Path, plain: int = 120) -> Path:
    """A folder of raw files and of the recipe mine.toml; `folder`/eval holds a test set."""
    random = Random(9)
    (folder / "eval").mkdir(parents=True)
    rows = sharegpt(random, plain)
    (folder / "ShareGPT_V3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))
    answers = [
        {"question": sentence(random), "human_answers": [sentence(random, 5), sentence(random, 9)],
         "chatgpt_answers": [sentence(random, 20)]}
        for _ in range(plain)
    ]  # fmt: skip
    with gzip.open(folder / "all.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in answers)
    tasks = [{"instruction": sentence(random), "input": "", "output": sentence(random)} for _ in range(plain)]
    tasks.append({"instruction": tasks[0]["instruction"], "input": "", "output": "something else"})  # exact
    (folder / "alpaca_data.json").write_text(json.dumps(tasks))
    pairs = [
        {which: f"\n\nHuman: {query}\n\nAssistant: {sentence(random, 4)}" for which in ("chosen", "rejected")}
        for query in (sentence(random) for _ in range(plain // 4))
    ]
    for name in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        for split in ("train", "test"):
            (folder / name).mkdir(exist_ok=True)
            with gzip.open(folder / name / f"{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in pairs[: 10 if split == "test" else None])
    (folder / "eval" / "koala_test_set.jsonl").write_text(json.dumps({"id": "1", "prompt": TESTED}) + "\n")
    (folder / "notes.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}) + "\n"
        + "not JSON\n"
    )  # fmt: skip
    (folder / "mine.toml").write_text(RECIPE)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder
