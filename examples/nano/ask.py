"""Asks a model the fixed prompts of evaluation.jsonl through `koala chat`, and lists every answer with its verdicts.

    python examples/nano/ask.py MODEL > examples/nano/answers.md

40 everyday prompts and 10 dialogues of two turns, each in a conversation of its own, greedily. Counted: a whole
sentence, on topic, right where there is a right answer, ended by itself. `koala` must be on the PATH.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROMPTS = Path(__file__).with_name("evaluation.jsonl")
WHOLE = re.compile(r"[A-Z0-9*\-`\"].*([.!?]\"?|\n- .+)", re.DOTALL)
LONGEST = 300  # tokens of a reply


@dataclass(frozen=True, slots=True)
class Prompt:
    """User texts in order, and what the reply to the last one must match to be on topic, and to be right."""

    users: tuple[str, ...]
    topic: str
    right: str | None
    itself: bool  # asks for the model's name or size


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply and what holds of it; `right` is None where there is no right answer."""

    prompt: Prompt
    reply: str
    stopped: bool

    @property
    def whole(self) -> bool:
        return WHOLE.fullmatch(self.reply) is not None

    @property
    def on_topic(self) -> bool:
        return re.search(self.prompt.topic, self.reply) is not None

    @property
    def right(self) -> bool | None:
        return None if self.prompt.right is None else re.search(self.prompt.right, self.reply) is not None


def read_prompts() -> list[Prompt]:
    """The fixed prompts, in order."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [Prompt((*row["earlier"], row["prompt"]), row["topic"], row["right"], "itself" in row) for row in rows]


def ask(model: str, prompts: list[Prompt]) -> list[Answer]:
    """The model's answers, each prompt in a new conversation of one `koala chat`."""
    lines = []
    for prompt in prompts:
        lines += [{"command": "/new"}, *({"user": text} for text in prompt.users)]
    command = ["koala", "chat", model, "--json", "--temperature", "0", "--max-tokens", str(LONGEST)]
    done = subprocess.run(
        command, input="".join(json.dumps(line) + "\n" for line in lines), capture_output=True, text=True, check=True
    )
    turns = iter([row for row in map(json.loads, done.stdout.splitlines()) if "reply" in row])
    answers = []
    for prompt in prompts:
        last = [next(turns) for _ in prompt.users][-1]
        answers.append(Answer(prompt, last["reply"].strip(), last["finish"] == "stop"))
    return answers


def listing(model: str, answers: list[Answer]) -> str:
    """All answers as Markdown, counts first."""
    judged = [answer.right for answer in answers if answer.right is not None]
    itself = [answer.right for answer in answers if answer.prompt.itself]
    later = [answer.on_topic for answer in answers if len(answer.prompt.users) > 1]
    counts = (
        ("ended by itself", sum(answer.stopped for answer in answers), len(answers)),
        ("whole sentences", sum(answer.whole for answer in answers), len(answers)),
        ("on topic", sum(answer.on_topic for answer in answers), len(answers)),
        ("right, where there is a right answer", sum(judged), len(judged)),
        ("its own name and size right", sum(map(bool, itself)), len(itself)),
        ("second turn on topic", sum(later), len(later)),
    )
    table = "".join(f"| {what} | {count} of {total} |\n" for what, count, total in counts)
    text = f"# Answers of {Path(model).name}\n\nGreedy, by `examples/nano/ask.py`.\n\n| | |\n|---|---|\n{table}\n"
    return text + "\n".join(_entry(answer) for answer in answers)


def _entry(answer: Answer) -> str:
    faults = [
        word
        for word, wrong in (
            ("does not end", not answer.stopped),
            ("no whole sentence", not answer.whole),
            ("off topic", not answer.on_topic),
            ("wrong", answer.right is False),
        )
        if wrong
    ]
    users = " / ".join(answer.prompt.users)
    verdict = f" **({', '.join(faults)})**" if faults else ""
    return f"- {users}{verdict}\n\n      " + answer.reply.replace("\n", "\n      ") + "\n"


def main() -> None:
    """Write the listing to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    model = parser.parse_args().model
    sys.stdout.write(listing(model, ask(model, read_prompts())))


if __name__ == "__main__":
    main()
