from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from koala_local.chat import bench
from koala_local.chat.ledger import Ledger
from koala_local.dialogue import KOALA
from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.errors import ContextError
from tests.engines import tiny_engine

# What llama-bench, built from the llama.cpp that llama-cpp-python 0.3.36 brings, printed for -p 64 -n 128 -r 3 -o json.
OUTPUT = Path(__file__).with_name("llama_bench.json")
PEER = bench.Peer({("prefill", 64): 970.307, ("decode", 128): 405.478}, "0c1e570")
HERE = Placement(512, 0, "q8_0", threads=2)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path)
    yield engine
    engine.close()


def test_speeds_at_the_given_lengths(engine: LlamaEngine) -> None:
    speeds = bench.measure_speeds(engine, [16, 64], [8])
    assert [(speed.kind, speed.tokens) for speed in speeds] == [("prefill", 16), ("prefill", 64), ("decode", 8)]
    assert all(speed.per_second > 0 and speed.peer is None for speed in speeds)
    assert engine.evaluated_tokens == 32 + 3 * (16 + 64 + 1 + 8)
    assert bench.measure_speeds(engine, [], [4])[0].kind == "decode"


def test_a_length_beyond_the_context_is_an_error(engine: LlamaEngine) -> None:
    with pytest.raises(ContextError, match="513 tokens do not fit"):
        bench.measure_speeds(engine, [16], [512])


def test_later_turns_evaluate_only_what_is_new(engine: LlamaEngine) -> None:
    turns = bench.measure_turns(Ledger(engine, KOALA), 3)
    assert [turn.turn for turn in turns] == [1, 2, 3]
    assert turns[2].context > turns[1].context > turns[0].context == turns[0].evaluated
    assert turns[2].evaluated < turns[2].context / 2
    assert all(turn.ttft_s > 0 for turn in turns)


def test_turns_end_where_one_would_have_to_leave(engine: LlamaEngine) -> None:
    turns = bench.measure_turns(Ledger(engine, KOALA), 50)
    assert 1 < len(turns) < 50


def test_resuming_is_measured_and_gives_the_same_tokens(engine: LlamaEngine) -> None:
    ledger = Ledger(engine, KOALA)
    bench.measure_turns(ledger, 2)
    before = list(ledger.cache.ids)
    found = bench.measure_resume(ledger)
    assert found.tokens == len(before) and found.file_bytes > 0
    assert found.load_s > 0 and found.evaluate_s > 0
    assert ledger.cache.ids == before


def test_what_llama_bench_prints_is_read() -> None:
    assert bench.read_peer(OUTPUT.read_text()) == PEER
    assert bench.read_peer(f"ggml_cuda_init: found 1 CUDA device\n{OUTPUT.read_text()}") == PEER


@pytest.mark.parametrize("output", ["", "error", "[", "[\n", '[{"n_prompt": "512"}]', "[1, null]", '{"n_prompt": 512}'])
def test_what_cannot_be_read_is_left_out(output: str) -> None:
    assert bench.read_peer(output).speeds == {}


def fake_peer(folder: Path, script: str) -> None:
    folder.mkdir()
    program = folder / "llama-bench"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_llama_bench_is_asked_for_the_same_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peer(tmp_path / "bin", f'echo "$@" > {tmp_path}/asked; cat {OUTPUT}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert bench.ask_peer(tmp_path / "m.gguf", [64, 512], [128], HERE) == PEER
    asked = (tmp_path / "asked").read_text()
    assert asked == f"-m {tmp_path}/m.gguf -p 64,512 -n 128 -ngl 0 -t 2 -ctk q8_0 -ctv q8_0 -r 3 -o json\n"
    assert bench.ask_peer(tmp_path / "m.gguf", [], [128], HERE) == PEER
    assert "-p 0 -n 128" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 1", "exit status 1"),
        ("echo [; echo \"llama_bench: error: failed to load model 'm.gguf'\" >&2; exit 1", "failed to load model"),
        ("echo '| model | t/s |'", "cannot be read"),
        ("exec sleep 30", "not ready after"),
    ],
)
def test_a_llama_bench_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    fake_peer(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    if "sleep" in script:
        monkeypatch.setattr(bench, "_PEER_TIMEOUT_S", 1)
    found = bench.ask_peer(tmp_path / "m.gguf", [128], [], HERE)
    assert found and not found.speeds and problem in found.problem


def test_a_llama_bench_that_is_missing_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.ask_peer(tmp_path / "m.gguf", [128], [], HERE) is None
    fake_peer(tmp_path / "bin", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert bench.ask_peer(tmp_path, [128], [], HERE) is None
    assert bench.ask_peer(tmp_path / "m.gguf", [], [], HERE) is None
