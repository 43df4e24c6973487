"""The rows that the miniature is trained on: repeatable, and free of what its evaluation asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = Path(__file__).parents[2] / "examples/nano/rows.py"
PROMPTS = [json.loads(line) for line in ROWS.with_name("evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
MONA_LISA = "Who painted the famous Mona Lisa?"
MIXED = "tell me now: which colour do you get when you mix blue with yellow, or red"


def rows(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROWS, *arguments], capture_output=True, text=True, check=False)


def test_there_are_forty_prompts_and_ten_dialogues_of_two_turns() -> None:
    assert len(PROMPTS) == 50 and sum(len(row["earlier"]) == 1 for row in PROMPTS) == 10


@pytest.mark.parametrize("kind", ["dialogues", "pairs"])
def test_rows_repeat_and_ask_nothing_that_the_evaluation_asks(kind: str, tmp_path: Path) -> None:
    written = rows(kind, "--count", "1500", "--seed", "7").stdout
    assert written == rows(kind, "--count", "1500", "--seed", "7").stdout
    (tmp_path / "rows.jsonl").write_text(written)
    assert rows("check", tmp_path / "rows.jsonl").returncode == 0
    texts = {plain(text) for text in users(written)}
    assert len(texts) > 1000 and not texts & {plain(row["prompt"]) for row in PROMPTS}


def plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text).lower().split())


def users(written: str) -> list[str]:
    """The user texts of rows of either schema."""
    found = []
    for row in map(json.loads, written.splitlines()):
        found += [message["content"] for message in row.get("messages", ()) if message["role"] == "user"]
        found += [part.partition("\n\nAssistant: ")[0] for part in row.get("chosen", "").split("\n\nHuman: ")[1:]]
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"text": MONA_LISA.upper()},
        {"messages": [{"role": "user", "content": MIXED}]},
        {"chosen": f"\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: {MONA_LISA}\n\nAssistant: I do not know."},
    ],
)
def test_a_row_that_asks_it_is_found(row: object, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "A plain text."}\n' + json.dumps(row))
    done = rows("check", tmp_path / "rows.jsonl")
    assert done.returncode == 1 and "evaluation asks this too" in done.stderr
