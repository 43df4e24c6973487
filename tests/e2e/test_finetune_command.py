"""`koala finetune` as a user runs it: on one process, on two machines, and what the trained folder is good for."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from koala_local.finetune.data.tokens import DialogueTokenizer

from koala_local.dialogue import Dialogue, Turn
from tests.e2e.terminal import CTRL_C, Terminal
from tests.e2e.test_chat_command import KOALA, koala
from tests.finetune_runs import SETTINGS, SHAPE, log_lines, losses, make_dialogues, make_tokenizer

pytestmark = pytest.mark.usefixtures("all_cores")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    folder = tmp_path_factory.mktemp("finetune")
    data, tokenizer = make_dialogues(folder / "sums.jsonl"), make_tokenizer(folder / "tokenizer")
    return ("--data", data, "--tokenizer", tokenizer, "--gpus", "0", *SHAPE, *SETTINGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, common: tuple[str | Path, ...]) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = koala(folder, "finetune", *common, "eval_every=20", "-o", folder / "run", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr.decode()
    errors = result.stderr.decode()
    assert result.stdout.decode().strip() == str(folder / "run")
    assert "parameters" in errors and "fits" in errors and "step 40/40" in errors and "Traceback" not in errors
    assert "torchao" not in errors and "Warning" not in errors
    return folder / "run"


def test_the_folder_is_a_checkpoint_with_all_that_belongs_to_it(trained: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(trained)
    assert model.config.eos_token_id == 2 and model.config.vocab_size == 330
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    steps = [line for line in log_lines(trained) if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "mfu", "memory_gb"}
    assert steps[0].keys() == keys
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    evaluations = [line for line in log_lines(trained) if line.get("event") == "evaluation"]
    assert [line["step"] for line in evaluations] == [20, 40]
    assert evaluations[1]["perplexity"]["all"] < evaluations[0]["perplexity"]["all"]
    assert len(evaluations[0]["samples"]) > 2
    assert (trained / "curves.png").stat().st_size > 10_000
    assert not list(trained.glob(".*"))
    assert "perplexity" in (trained / "README.md").read_text().lower()
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step-00000035", "step-00000040"]
    assert list((trained / "tensorboard").iterdir())


def test_the_export_has_learned(trained: Path) -> None:
    """Sums that it has seen are likelier than sums that are wrong."""
    from transformers import LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(trained), DialogueTokenizer(trained)

    def loss(reply: str) -> float:
        found = tokenizer.encode(Dialogue((Turn("what is 3 plus 4?", reply),)))
        ids = torch.tensor([found.ids])
        with torch.no_grad():
            return float(model(ids, labels=ids.masked_fill(torch.tensor([list(found.trained)]) == 0, -100)).loss)

    assert loss("3 plus 4 is 7.") < loss("zebras?") - 1


def test_it_can_be_quantized_and_talked_to(tmp_path: Path, trained: Path) -> None:
    made = koala(tmp_path, "quantize", trained, "-o", tmp_path / "sums.gguf", "--type", "F16", "--no-verify")
    assert made.returncode == 0, made.stderr.decode()
    reply = koala(tmp_path, "chat", tmp_path / "sums.gguf", "--json", "-p", "what is 3 plus 4?", "--max-tokens", "8")
    assert reply.returncode == 0, reply.stderr.decode()
    prompt = DialogueTokenizer(trained).encode(Dialogue((Turn("what is 3 plus 4?"),))).ids
    assert json.loads(reply.stdout)["stats"]["prompt_tokens"] == len(prompt)  # chat writes what was trained on


def test_it_can_be_trained_further(tmp_path: Path, trained: Path, common: tuple[str | Path, ...]) -> None:
    data = common[1]
    more = ("--base", trained, "--data", data, "--gpus", "0", *SETTINGS, "max_steps=5")
    result = koala(tmp_path, "finetune", *more, "-o", tmp_path / "run", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr.decode()
    assert losses(tmp_path / "run")[1] < losses(trained)[1] - 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path, trained: Path, common: tuple[str | Path, ...]) -> None:
    weights = (trained / "model.safetensors").stat().st_mtime_ns
    result = koala(tmp_path, "finetune", *common, "-o", trained, "--resume")
    assert result.returncode == 0  # the same line can be given again, by a queue for one
    assert b"is finished" in result.stderr and result.stdout.decode().strip() == str(trained)
    assert (trained / "model.safetensors").stat().st_mtime_ns == weights


def test_a_terminal_shows_one_line_that_lives(tmp_path: Path, common: tuple[str | Path, ...]) -> None:
    line = re.compile(r"^step (\d+)/4000  loss \d\.\d{4}  [\d,]+ tokens/s  \d\.\d GB  \d+:\d\d:\d\d left", re.MULTILINE)
    long = ("epochs=1000", "max_steps=4000", "save_every=4000")
    terminal = Terminal(tmp_path / "home", "finetune", *common, *long, "-o", tmp_path / "run", columns=100)
    try:
        terminal.wait(lambda: bool(line.search(terminal.text)), "the live line", 120)
        first = int(line.findall(terminal.text)[0])
        terminal.wait(lambda: int((line.findall(terminal.text) or [0])[0]) > first, "a later step")
        assert len(line.findall(terminal.text)) == 1
        terminal.keys(CTRL_C)
        assert terminal.end() == 130
        assert not line.search(terminal.text) and "--resume goes on" in " ".join(terminal.lines)
    finally:
        terminal.kill()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


REHEARSAL = "--gpus 0 --nodes 2 --rendezvous 127.0.0.1:29400"


@contextmanager
def two_machines(home: Path, *arguments: str | Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The rehearsal of docs/multi-node.md: two processes, each as if on a machine of its own."""
    environment = os.environ | {"KOALA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [KOALA, "finetune", *map(str, arguments), *REHEARSAL.replace("29400", str(free_port())).split()]
    pipe = subprocess.PIPE
    nodes = [subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) for _ in range(2)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.kill()  # its ranks end with it


def test_two_machines_as_docs_multi_node_says(tmp_path: Path, trained: Path, common: tuple[str | Path, ...]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "multi-node.md").read_text()
    assert page.count(REHEARSAL) == 2
    out = tmp_path / "run"
    with two_machines(tmp_path, *common, "eval_every=20", "-o", out) as nodes:
        ends = [(*node.communicate(timeout=120), node.returncode) for node in nodes]
    assert b"waiting for all 2 nodes at 127.0.0.1:" in ends[0][1]
    assert [status for *_, status in ends] == [0, 0], ends
    alone = losses(trained)
    assert losses(out).keys() == alone.keys()
    assert all(abs(loss - alone[step]) < 1e-4 for step, loss in losses(out).items())
    assert (out / "model.safetensors").exists()


def test_a_rank_that_dies_on_one_machine_ends_the_other(tmp_path: Path, common: tuple[str | Path, ...]) -> None:
    out = tmp_path / "run"
    with two_machines(tmp_path, *common, "max_steps=5000", "epochs=200", "-o", out) as nodes:
        end = time.monotonic() + 100
        while max(losses(out), default=0) < 3:
            assert time.monotonic() < end
            assert [node.poll() for node in nodes] == [None, None]
            time.sleep(0.02)
        children = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ranks[-1], signal.SIGKILL)
        (_, other), (_, own) = (node.communicate(timeout=60) for node in nodes)
    assert [node.returncode for node in nodes] == [1, 1]
    assert b"was killed by SIGKILL" in own
    assert b"koala: error: the connection to another rank was lost" in other and b"--resume" in other
    assert b"internal error" not in own + other


def test_a_blow_up_is_told_and_logged(tmp_path: Path, common: tuple[str | Path, ...]) -> None:
    wild = ("learning_rate=10", "warmup_steps=0", "clip=1e9", "-o", tmp_path / "run")
    result = koala(tmp_path, "finetune", *common, *wild, OMP_NUM_THREADS="1")
    assert result.returncode == 1, result.stderr.decode()
    last = log_lines(tmp_path / "run")[-1]
    assert last["event"] == "stopped" and last["why"] in result.stderr.decode()
    assert re.search(r"most in rows? \d", last["why"])
