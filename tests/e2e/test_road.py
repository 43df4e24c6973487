"""The whole road with the installed program: rows -> tokenizer -> corpus -> a base from scratch, killed and resumed ->
a Koala on top -> GGUF and GPTQ -> two turns in the terminal with each. It is the road of examples/nano.sh, made tiny.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.terminal import CTRL_D, KOALA, Terminal
from tests.finetune_runs import log_lines, losses

ROOT = Path(__file__).parents[2]
SHAPE = (
    "model.hidden_size=128", "model.feed_forward_size=256", "model.layers=2", "model.heads=4", "model.kv_heads=2",
    "model.context=512", "model.tied_embeddings=true",
)  # fmt: skip
RUN = (
    "sequence_length=256", "global_batch=4", "micro_batch=4", "max_steps=60", "learning_rate=5e-3", "warmup_steps=5",
    "recompute=none", "dropout=0", "eval_every=60", "save_every=10",
)  # fmt: skip
STEPS, KILLED_AFTER, PIECES = 60, 25, 600


def koala(*arguments: str | Path) -> str:
    """What the program writes to stdout."""
    command = [KOALA, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the miniature's generator, and the recipes over them."""
    folder = tmp_path_factory.mktemp("road")
    wanted = (("world", "dialogues", 1, 700), ("more", "dialogues", 2, 500), ("pairs", "pairs", 3, 60))
    for name, kind, seed, count in wanted:
        command = [
            sys.executable,
            str(ROOT / "examples/nano/rows.py"),
            kind,
            "--seed",
            str(seed),
            "--count",
            str(count),
        ]
        (folder / f"{name}.jsonl").write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    (folder / "text.jsonl").write_text('{"text": "Koalas sleep for most of the day, high up in a tree."}\n' * 20)
    for mix, files in (("base", ("world", "text")), ("koala", ("more", "pairs"))):
        sources = (f'[sources.my-{name}]\nfiles = ["{name}.jsonl"]\n' for name in files)
        (folder / f"{mix}.toml").write_text("".join(sources))
    return folder


@pytest.fixture(scope="module")
def base(rows: Path) -> Path:
    """A base from scratch, whose training was killed on the way."""
    koala("data", "tokenizer", rows / "world.jsonl", "--size", str(PIECES), "-o", rows / "tokenizer")
    koala("data", "build", rows / "base.toml", "--tokenizer", rows / "tokenizer", "-o", rows / "base-corpus")
    out = rows / "base"
    folders = ("--data", rows / "base-corpus", "--tokenizer", rows / "tokenizer", "-o", out)
    command = ["finetune", *map(str, folders), "--gpus", "0", *SHAPE, *RUN]
    training = subprocess.Popen([KOALA, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while max(losses(out), default=0) < KILLED_AFTER:
        assert training.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert not (out / "config.json").exists()
    koala(*command, "--resume")
    return out


@pytest.fixture(scope="module")
def trained(rows: Path, base: Path) -> Path:
    koala("data", "build", rows / "koala.toml", "--tokenizer", base, "-o", rows / "koala-corpus")
    out = rows / "koala-road"
    koala("finetune", "--base", base, "--data", rows / "koala-corpus", "-o", out, "--gpus", "0", *RUN, "seed=3")
    return out


def test_both_trainings_learn(base: Path, trained: Path) -> None:
    first, second = losses(base), losses(trained)
    assert sorted(first) == sorted(second) == list(range(1, STEPS + 1))
    assert first[STEPS] < first[1] - 1.2  # from the logarithm of the vocabulary's size
    assert second[1] < first[1] - 1.2  # the base was taken up
    assert sum(second[step] for step in range(51, 61)) < sum(second[step] for step in range(1, 11))
    held_out = log_lines(trained)[-1]["perplexity"]
    assert held_out["all"] < PIECES / 4
    assert sum(line["tokens"] for line in log_lines(base) if "event" not in line) > 0.9 * STEPS * 4 * 256


def test_it_loads_elsewhere(trained: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(trained)
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (PIECES, 2)


@pytest.mark.parametrize("layout", ["gguf", "gptq"])
def test_quantized_it_talks_in_the_terminal(trained: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / ("koala-road.gguf" if layout == "gguf" else "koala-road-gptq")
    koala("quantize", trained, "--format", layout, "--bits", "4", "-o", out, "--no-verify")
    weights = sum(path.stat().st_size for path in ([out] if out.is_file() else out.glob("*.safetensors")))
    assert weights < 0.75 * (trained / "model.safetensors").stat().st_size
    terminal = Terminal(tmp_path / "home", "chat", out, "--temperature", "0", "--max-tokens", "12")
    try:
        terminal.ready()
        assert terminal.send("What does a cow eat?")
        first = prompt_tokens(terminal)
        assert terminal.send("And where does it live?")
        second = prompt_tokens(terminal)
        assert first[1] == 0
        assert second[1] >= first[0]  # all of the first turn is taken from the cache
        assert second[0] == second[1] + second[2] and second[2] < first[0] + 12
        terminal.keys(CTRL_D)
        assert terminal.end() == 0
    finally:
        terminal.kill()


def prompt_tokens(terminal: Terminal) -> tuple[int, int, int]:
    """Of the last reply's prompt: all tokens, those reused, those evaluated."""
    found = re.search(r"prompt +(\d+) tokens: (\d+) reused, (\d+) evaluated", terminal.send("/stats"))
    assert found
    return int(found[1]), int(found[2]), int(found[3])
