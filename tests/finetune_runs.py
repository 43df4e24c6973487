"""Training runs, small enough for a test: sums to learn, and a model of two layers."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from koala_local.finetune.command import finetune

from koala_local import console

SHAPE = (
    "model.hidden_size=32", "model.feed_forward_size=64", "model.layers=2", "model.heads=4", "model.kv_heads=2",
    "model.context=128",
)  # fmt: skip
SETTINGS = (
    "sequence_length=64", "global_batch=8", "micro_batch=8", "recompute=none", "learning_rate=3e-3",
    "warmup_steps=5", "dropout=0.1", "save_every=5", "eval_every=0", "max_steps=40", "seed=7",
)  # fmt: skip


def make_dialogues(path: Path, count: int = 400, seed: int = 1) -> Path:
    """Write questions about sums and return the path."""
    dice = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            left, right = dice.randrange(20), dice.randrange(20)
            turns = [
                ("user", f"what is {left} plus {right}?"),
                ("assistant", f"{left} plus {right} is {left + right}."),
            ]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return path


def make_tokenizer(folder: Path, size: int = 330) -> Path:
    """Write a throw-away tokenizer.model of `size` pieces, with bytes for what they lack, and return its folder."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"what is {number} plus {number}? {number} plus {number} is {2 * number}." for number in range(40)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "BEGINNING OF CONVERSATION: USER: GPT:"]),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


class Training:
    """`koala finetune` in a process of its own, forked from one that has imported what takes seconds to import."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        """`folder` is for what it prints."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.finetune_preload"])
        self.errors = folder / f"errors-{next(_numbers)}"
        self.process = context.Process(target=_train, args=([*map(str, arguments)], self.errors))
        self.process.start()

    def send(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def finish(self, seconds: float = 120.0) -> tuple[int | None, str]:
        """The exit status, negative for a signal, and what was written to stderr."""
        self.process.join(seconds)
        return self.process.exitcode, self.errors.read_text()

    def wait_for(self, out: Path, step: int) -> None:
        """Return when the log has the step."""
        end = time.monotonic() + 100
        while max(losses(out), default=-1) < step:
            assert self.process.is_alive(), self.finish()
            assert time.monotonic() < end
            time.sleep(0.005)


_numbers = count()


def _train(arguments: list[str], errors: Path) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    status = console.run(lambda: finetune.main(arguments, standalone_mode=False))
    sys.exit(status)


def log_lines(out: Path) -> list[dict[str, Any]]:
    """The whole lines of the run's log, steps and events."""
    path = out / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_lines(out) if "event" not in line}
