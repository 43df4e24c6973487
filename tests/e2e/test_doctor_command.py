"""The installed `koala` telling of a machine and of models: doctor, show, bench, the plan at the start of a chat."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.e2e.test_chat_command import koala
from tests.gguf_maker import make_model
from tests.unit.chat.test_bench import OUTPUT, PEER, fake_peer


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=512)


def test_doctor(home: Path) -> None:
    done = koala(home, "doctor", HOME=str(home.parent), HF_HOME=str(home / "hf"))
    page = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    for part in ("versions", "llama-cpp-python", "backends", "CPU", "prefill", "decode", "~/home/data"):
        assert part in page
    assert str(home.parent) not in page


def test_doctor_for_a_bug_report(home: Path) -> None:
    done = koala(home, "doctor", "--json", HOME=str(home.parent))
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["speed"]["decode"] > 0
    assert all(set(finding) == {"what", "remedy", "broken"} for finding in report["findings"])
    assert str(home.parent) not in done.stdout.decode()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs a folder that cannot be made")
def test_doctor_finds_a_data_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = koala(tmp_path / "file", "doctor", "--json")
    assert done.returncode == 0
    (found,) = [part for part in json.loads(done.stdout)["findings"] if "cannot be written" in part["what"]]
    assert "KOALA_HOME" in found["remedy"]


def test_show(home: Path, model: Path) -> None:
    done = koala(home, "show", model)
    page = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b""
    for part in ("architecture", "llama, 2 layers", "F32", "KV cache", "licence", "RAM"):
        assert part in page
    about = json.loads(koala(home, "show", "nano", "--json", "--context", "1024").stdout)
    assert about["plan"]["context"] == 1024 and about["plan"]["bytes"]["kv"] > 0


def test_show_survives_hostile_headers(home: Path, tmp_path: Path, model: Path) -> None:
    content = bytearray(model.read_bytes())
    (tmp_path / "cut.gguf").write_bytes(content[:200])
    content[8:16] = b"\xff" * 8  # tensors without end
    (tmp_path / "many.gguf").write_bytes(content)
    named = make_model(tmp_path / "named.gguf", name="\x1b]52;c;aGk=\x07evil\nname")
    for path in (tmp_path / "cut.gguf", tmp_path / "many.gguf"):
        done = koala(home, "show", path)
        assert done.returncode == 1 and done.stderr.startswith(b"koala: error: ")
    done = koala(home, "show", named)
    assert done.returncode == 0 and b"\x1b" not in done.stdout and done.stdout.splitlines()[0].endswith(b"evil name")


def test_bench_beside_llama_bench(home: Path, tmp_path: Path, model: Path) -> None:
    fake_peer(tmp_path / "bin", f"cat {OUTPUT}")
    arguments = ("bench", model, "--prefill", "64", "--decode", "128", "--turns", "3")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = koala(home, *arguments, PATH=path)
    page = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert (
        "LLAMA-BENCH" in page
        and f"{PEER.speeds['decode', 128]:.1f}" in page
        and "FIRST TOKEN" in page
        and "resume" in page
    )
    found = json.loads(koala(home, *arguments, "--json", PATH=path).stdout)
    assert [speed["peer"] for speed in found["speeds"]] == [*PEER.speeds.values()]
    assert len(found["turns"]) == 3 and found["resume"]["tokens"] > 0 and found["peak_bytes"] > 0


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "", "1,,2", "99999999999"])
def test_bench_refuses_lengths_that_are_none(home: Path, model: Path, value: str) -> None:
    assert koala(home, "bench", model, f"--prefill={value}").returncode == 2


def test_a_chat_begins_with_its_plan(home: Path, model: Path) -> None:
    def told(*arguments: str | Path) -> bytes:
        done = koala(home, "chat", *arguments, stdin=b"")
        assert done.returncode == 0, done.stderr.decode()
        return bytes(done.stderr)

    assert b"memory: " in told(model, "--json") and b"context 512" in told(model, "--json")
    assert b"memory: " not in told("nano", "--json")
    assert b"memory: " not in told(model, "-p", "hi", "--max-tokens", "2")
    assert b"context 256" in told(model, "--json", "--context", "256", "--gpu-layers", "auto", "--kv-type", "auto")
    assert koala(home, "chat", model, "--context", "some", "-p", "x").returncode == 2
