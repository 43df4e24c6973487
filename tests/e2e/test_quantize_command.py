"""`koala quantize` and `koala recover` as a user runs them, and the result in `koala chat`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint_maker import make_hf
from tests.e2e.test_chat_command import koala
from tests.unit.convert.llama_quantize import read_tensors
from tests.unit.convert.test_importance import write_gguf as write_imatrix

TINY_LLAMA = Path(os.environ.get("KOALA_TEST_DATA", "/nonexistent")) / "models" / "llama-2-tiny-random.gguf"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("koala-test") / "koala-tiny", layers=2, hidden=256)


def quantize(home: Path, *arguments: str | Path) -> Any:
    return koala(home, "quantize", *arguments)


def stated(result: Any, what: str) -> bytes:
    """What stderr says of a sample: which it is, how much time it takes, and how much memory."""
    size = rb"[\d,]+ tokens, about [\d.]+ (?:s|min|h), at most about [\d.]+ [MG]B of memory"
    found = re.search(rb"^%s: (.+ tokens from .+); %s" % (what.encode(), size), result.stderr, re.MULTILINE)
    assert found, result.stderr.decode()
    return found[1]


def test_from_a_checkpoint_to_a_conversation(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "tiny.gguf"
    result = quantize(tmp_path, checkpoint, "-o", out, "--bits", "4")
    assert result.returncode == 0, result.stderr.decode()
    assert b"Q4_K_M" in result.stdout and b"perplexity" in result.stdout
    assert b" x 512 tokens from the built-in held-out text" in stated(result, "verification")
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert report["kind"] == "Q4_K_M"
    assert report["size"] == out.stat().st_size
    assert report["comparison"]["kl_mean"] < 0.05
    assert "research" in (tmp_path / "tiny.md").read_text()  # Koala's licence, by the checkpoint's name
    reply = koala(tmp_path / "home", "chat", out, "--json", "-p", "hello", "--max-tokens", "4")
    assert json.loads(reply.stdout)["stats"]["generated_tokens"] <= 4


def test_json_type_and_calibration(tmp_path: Path, checkpoint: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("the hat and the cat are at the inn, and then another one. " * 200)
    result = quantize(
        tmp_path, checkpoint, "-o", tmp_path / "x.gguf", "--type", "q3_k_m", "--calibration", text,
        "--tensor-type", "ffn_down=Q6_K", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert report["kind"] == "Q3_K_M"
    assert report["calibration"].encode() == stated(result, "calibration")
    assert " x 512 tokens from words.txt" in report["calibration"]


def test_an_importance_matrix_of_llama_cpps(tmp_path: Path, checkpoint: Path) -> None:
    """Every matrix that it has columns for comes out in other bytes than without it, and nothing else."""
    columns = {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256, "ffn_gate": 256, "ffn_up": 256}
    sizes = {f"blk.{i}.{name}.weight": count for i in range(2) for name, count in (columns | {"ffn_down": 512}).items()}
    random = np.random.default_rng(0)
    sums = {f"{name}.in_sum2": random.random((1, count), np.float32) + 0.01 for name, count in sizes.items()}
    counts = {f"{name}.counts": np.ones((1, 1), np.float32) for name in sizes}
    matrix = write_imatrix(tmp_path / "imatrix.gguf", sums | counts)
    with_it, without = tmp_path / "with.gguf", tmp_path / "without.gguf"
    result = quantize(tmp_path, checkpoint, "-o", with_it, "--no-verify", "--json", "--imatrix", matrix)
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert report["calibration"] == "imatrix.gguf"
    assert not any("lacks" in note for note in report["notes"])
    assert quantize(tmp_path, checkpoint, "-o", without, "--no-verify").returncode == 0
    changed, plain = read_tensors(with_it), read_tensors(without)
    assert {name for name in plain if changed[name] != plain[name]} == set(sizes)


def test_a_gguf_is_a_source_too(tmp_path: Path, checkpoint: Path) -> None:
    whole, again, direct = tmp_path / "f32.gguf", tmp_path / "again.gguf", tmp_path / "direct.gguf"
    assert quantize(tmp_path, checkpoint, "-o", whole, "--type", "BF16", "--no-verify").returncode == 0
    result = quantize(tmp_path, whole, "-o", again, "--bits", "8")
    assert result.returncode == 0, result.stderr.decode()
    assert quantize(tmp_path, checkpoint, "-o", direct, "--bits", "8", "--no-verify").returncode == 0
    tail = 200_000  # the tensors; names differ in the head
    assert again.read_bytes()[-tail:] == direct.read_bytes()[-tail:]


@pytest.mark.skipif(not TINY_LLAMA.is_file(), reason="KOALA_TEST_DATA names no folder with real models")
def test_a_gguf_that_others_made(tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    result = quantize(tmp_path, TINY_LLAMA, "-o", out, "--bits", "8")
    assert result.returncode == 0, result.stderr.decode()
    assert b"perplexity" in result.stdout
    source, written = read_tensors(TINY_LLAMA), read_tensors(out)
    assert written.keys() == source.keys()
    assert any(written[name] != source[name] for name in source)


def test_an_existing_output_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    result = quantize(tmp_path, checkpoint, "-o", out)
    assert result.returncode == 1
    assert b"exists already" in result.stderr
    assert out.read_text() == "precious"
    assert quantize(tmp_path, checkpoint, "-o", out, "--force", "--no-verify").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--type", "Q9_Z"], b"Q9_Z"),
        (["--tensor-type", "ffn_down"], b"tensor type"),
        (["--bits", "7"], b"7"),
        (["--calibration", "no-such-file"], b"no-such-file"),
    ],
)
def test_bad_options(tmp_path: Path, checkpoint: Path, arguments: list[str], what: bytes) -> None:
    result = quantize(tmp_path, checkpoint, "-o", tmp_path / "x.gguf", *arguments)
    assert result.returncode in (1, 2)
    assert what in result.stderr
    assert list(tmp_path.glob("*x.gguf*")) == []


def test_a_broken_result_leaves_no_file(tmp_path: Path, checkpoint: Path) -> None:
    """A mix that claims 16 bits and holds 2 diverges more than 16 bits may."""
    out = tmp_path / "x.gguf"
    result = quantize(tmp_path, checkpoint, "-o", out, "--type", "F16", "--tensor-type", ".*=Q2_K")
    assert result.returncode == 1, result.stdout.decode()
    assert b"KL" in result.stderr
    assert list(tmp_path.glob("*")) == []


def test_a_run_that_is_killed_before_its_result_is_verified_leaves_nothing_for_good(
    tmp_path: Path, checkpoint: Path
) -> None:
    code = (
        "import os, signal\n"
        "from koala_local import console\n"
        "from koala_local.convert import verify\n"
        "verify.check = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from koala_local.convert.command import quantize\n"
        "raise SystemExit(console.run(lambda: quantize.main(standalone_mode=False)))\n"
    )
    arguments = [str(checkpoint), "-o", str(tmp_path / "x.gguf")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert result.returncode == -9, result.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.gguf.lock", ".x.gguf.partial"]
    assert quantize(tmp_path, checkpoint, "-o", tmp_path / "x.gguf", "--no-verify").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf", "x.json", "x.md"]


def test_recover_adds_the_difference(tmp_path: Path) -> None:
    base = make_hf(tmp_path / "base", layers=2, hidden=64, seed=1, dtype=torch.float32)
    diff = make_hf(tmp_path / "diff", layers=2, hidden=64, seed=2, dtype=torch.float32)
    result = koala(tmp_path / "home", "recover", "--base", base, "--diff", diff, "-o", tmp_path / "koala")
    assert result.returncode == 0, result.stderr.decode()
    from transformers import LlamaForCausalLM

    states = [LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (base, diff, tmp_path / "koala")]
    for name, tensor in states[2].items():
        assert torch.equal(tensor, states[0][name] + states[1][name])
    again = koala(tmp_path / "home", "recover", "--base", base, "--diff", diff, "-o", tmp_path / "koala")
    assert again.returncode == 1
    assert b"exists" in again.stderr
    pair = quantize(tmp_path / "home", diff, "--base", base, "-o", tmp_path / "pair.gguf")
    assert pair.returncode == 0, pair.stderr.decode()
    assert b"perplexity" in pair.stdout
    whole = quantize(tmp_path / "home", tmp_path / "koala", "-o", tmp_path / "whole.gguf", "--no-verify")
    assert whole.returncode == 0, whole.stderr.decode()
    assert read_tensors(tmp_path / "pair.gguf") == read_tensors(tmp_path / "whole.gguf")


def test_recover_believes_the_checklist_beside_the_base(tmp_path: Path) -> None:
    base = make_hf(tmp_path / "base", layers=1, hidden=64, seed=1)
    diff = make_hf(tmp_path / "diff", layers=1, hidden=64, seed=2)
    (base / "checklist.chk").write_text(f"{'0' * 32}  model.safetensors\n")
    result = koala(tmp_path / "home", "recover", "--base", base, "--diff", diff, "-o", tmp_path / "koala")
    assert result.returncode == 1
    assert b"model.safetensors has the MD5" in result.stderr
    assert not list(tmp_path.glob("koala*"))


def test_gptq_from_a_checkpoint_to_a_conversation_that_is_resumed(tmp_path: Path, checkpoint: Path) -> None:
    out, home = tmp_path / "tiny-gptq", tmp_path / "home"
    result = quantize(home, checkpoint, "-o", out, "--format", "gptq", "--bits", "4", "--group-size", "64")
    assert result.returncode == 0, result.stderr.decode()
    assert b"perplexity" in result.stdout
    assert json.loads((out / "quantization.json").read_text())["format"] == "GPTQ"
    stdin = b'{"user": "hello"}\n{"user": "more"}\n{"command": "/regen"}\n'
    options = ("--json", "--max-tokens", "6", "--seed", "1")
    lines = koala(home, "chat", out, *options, stdin=stdin).stdout.splitlines()
    first, second, again = (json.loads(line)["stats"] for line in lines)
    assert second["reused_tokens"] == first["prompt_tokens"] + first["generated_tokens"] + 1
    assert again["evaluated_tokens"] == 1
    resumed = json.loads(koala(home, "chat", *options, "--resume", stdin=b'{"user": "on"}\n').stdout)["stats"]
    assert resumed["reused_tokens"] == again["prompt_tokens"] + again["generated_tokens"] + 1
    refused = quantize(home, checkpoint, "-o", out, "--format", "gptq")
    assert refused.returncode == 1 and b"exists already" in refused.stderr
    assert quantize(home, checkpoint, "--format", "gptq", "--type", "Q4_K_M").returncode == 2


def test_gptq_on_a_text_of_ones_own_names_it(tmp_path: Path, checkpoint: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("the hat and the cat are at the inn, and then another one. " * 100)
    options = ("--format", "gptq", "--group-size", "64", "--no-verify", "--json")
    result = quantize(tmp_path, checkpoint, "-o", tmp_path / "out", "--calibration", text, *options)
    assert result.returncode == 0, result.stderr.decode()
    calibration = json.loads(result.stdout)["calibration"]
    assert " x 512 tokens from words.txt" in calibration
    assert calibration.encode() == stated(result, "calibration")
    assert "words.txt" in (tmp_path / "out/README.md").read_text()


def test_a_folder_that_is_not_quantized_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    result = koala(tmp_path / "home", "chat", checkpoint, "-p", "hi")
    assert result.returncode == 1
    assert result.stderr.startswith(b"koala: error: ")


def test_a_broken_gptq_result_leaves_no_folder_and_does_not_touch_an_old_one(tmp_path: Path, checkpoint: Path) -> None:
    """A bound that nothing meets stands in for a broken quantization."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    code = (
        "from koala_local.convert import verify\n"
        "verify.KL_BOUNDS['GPTQ-2'] = 1e-9\n"
        "from koala_local import console\n"
        "from koala_local.convert.command import quantize\n"
        "raise SystemExit(console.run(lambda: quantize.main(standalone_mode=False)))\n"
    )
    arguments = [str(checkpoint), "-o", str(out), "--format", "gptq", "--bits", "2", "--force"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert result.returncode == 1
    assert b"KL divergence" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
