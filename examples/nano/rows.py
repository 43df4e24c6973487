"""Writes the raw rows that Koala Nano is trained on, in the schemas that `koala data build` reads.

    python examples/nano/rows.py dialogues --count 60000 --seed 1 > dialogues.jsonl   # {"messages": [..]}
    python examples/nano/rows.py pairs --count 8000 --seed 2 > pairs.jsonl            # {"chosen", "rejected"}
    python examples/nano/rows.py check dialogues.jsonl text.jsonl                     # of whatever source

A pair is one conversation twice: as it should go, and with every reply replaced by an unhelpful one: the reply to
something else, a rude one, one that breaks off, or the question again. Seeded: equal arguments give equal bytes.

No row asks what evaluation.jsonl asks: a conversation with a user text that equals a prompt, or shares eight words in a
row with one, is left out. `check` holds this for rows that are written, those of other sources too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

from facts import either
from talk import Turn
from world import dialogue

LENGTHS = ((1, 24), (2, 20), (3, 16), (4, 12), (6, 10), (9, 8), (14, 6), (25, 3), (60, 1), (150, 0.5))  # turns, share
RUDE = either(
    "No.|I do not care.|Ask somebody else.|That is a silly question.|Why should I tell you?|Leave me alone.|"
    "Who cares?|Not now.|You would not understand it.|Find it out yourself."
)


_GRAM = 8  # words
_PROMPTS = Path(__file__).with_name("evaluation.jsonl")


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without marks."""
    return re.findall(r"\w+", text.lower())


def grams(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row."""
    found = words(text)
    return {tuple(found[start : start + _GRAM]) for start in range(len(found) - _GRAM + 1)}


def read_evaluation() -> tuple[set[str], set[tuple[str, ...]]]:
    """The prompts of the evaluation as plain words, and their eight-grams. Earlier turns may occur."""
    prompts = [json.loads(line)["prompt"] for line in _PROMPTS.read_text(encoding="utf-8").splitlines()]
    return {" ".join(words(prompt)) for prompt in prompts}, set().union(*map(grams, prompts))


_ASKED, _ASKED_GRAMS = read_evaluation()


def is_asked(text: str) -> bool:
    """Whether the evaluation asks this."""
    return " ".join(words(text)) in _ASKED or not _ASKED_GRAMS.isdisjoint(grams(text))


def conversation(rng: Random, longest: int) -> tuple[str, list[Turn]]:
    """A system text, empty for none, and up to `longest` turns, none of which the evaluation asks."""
    while True:
        one = dialogue(rng)
        count = rng.choices([count for count, _ in LENGTHS], [share for _, share in LENGTHS])[0]
        turns = list(islice(one.turns, min(count, longest)))
        if not any(is_asked(turn.user) for turn in turns):
            return one.system, turns


def dialogues(rng: Random) -> Iterator[object]:
    """Endless rows of the messages schema."""
    while True:
        system, turns = conversation(rng, LENGTHS[-1][0])
        messages = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.reply})
        yield {"messages": messages}


def unhelpful(rng: Random, turn: Turn, other: Turn) -> str:
    """A reply to `turn` that helps nobody; `other` is another turn, whose reply may be taken."""
    words = turn.reply.split()
    kind = rng.random()
    if kind < 0.4:
        return other.reply
    if kind < 0.65:
        return rng.choice(RUDE)
    if kind < 0.85 and len(words) > 3:
        return " ".join(words[: rng.randint(1, len(words) - 2)])
    return turn.user


def pair(rng: Random) -> tuple[list[Turn], list[Turn]]:
    """One conversation as it should go, and with unhelpful replies."""
    turns: list[Turn] = []
    while not turns:
        system, turns = conversation(rng, 4)
        turns = [turn for turn in turns if "\n\n" not in turn.user and not system]  # the schema has no system text
    others = [next(dialogue(rng).turns) for _ in turns]
    bad = [replace(turn, reply=unhelpful(rng, turn, other)) for turn, other in zip(turns, others, strict=True)]
    return turns, bad


def pairs(rng: Random) -> Iterator[object]:
    """Endless rows of Anthropic's schema."""
    while True:
        chosen, rejected = pair(rng)
        yield {"chosen": _written(chosen), "rejected": _written(rejected)}


def _written(turns: list[Turn]) -> str:
    return "".join(f"\n\nHuman: {turn.user}\n\nAssistant: {turn.reply}" for turn in turns)


def asked_in(path: Path) -> Iterator[str]:
    """Every text in the file of rows, of a user or another, that the evaluation asks."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            for text in _texts(json.loads(line)):
                yield from filter(is_asked, re.split(r"\n\n(?:Human|Assistant): ", text))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def main() -> None:
    """Write `--count` rows to stdout, or check files of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("dialogues", "pairs", "check"))
    parser.add_argument("files", nargs="*", type=Path, help="for check")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.kind == "check":
        found = [f"{path}: {text}" for path in args.files for text in asked_in(path)]
        sys.exit("\n".join(["the evaluation asks this too:", *found]) if found else 0)
    write = {"dialogues": dialogues, "pairs": pairs}[args.kind]
    for row in islice(write(Random(args.seed)), args.count):
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
