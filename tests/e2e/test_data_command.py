"""`koala data` as a user runs it: raw files in, a corpus that can be looked into out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.terminal import KOALA
from tests.unit.finetune.data.raw_maker import TESTED, make_raw

_PNG = b"\x89PNG\r\n\x1a\n"


def data(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """`koala data` with these arguments."""
    command = [KOALA, "data", *map(str, arguments)]
    environment = os.environ | {"KOALA_HOME": str(home)}
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("koala-e2e") / "raw")


@pytest.fixture(scope="module")
def built(raw: Path) -> tuple[Path, subprocess.CompletedProcess[bytes]]:
    out = raw.parent / "corpus"
    options = ("--raw", raw, "--tokenizer", raw / "tokenizer.model", "-o", out, "--workers", "1")
    return out, data(raw.parent, "build", raw / "mine.toml", *options)


def test_build_shows_what_it_made(built: tuple[Path, subprocess.CompletedProcess[bytes]]) -> None:
    out, done = built
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert "recipe mine" in text and "ShareGPT" in text
    assert "30,000" in text  # the published count
    assert "published files" not in text and b"warning" not in done.stderr
    assert "Held against the test sets koala_test_set.jsonl (1 queries)" in " ".join(text.split())
    assert "koala_test_set.jsonl:1" in text and "notes.jsonl:2" in text
    assert (out / "dialogues.jsonl").is_file() and (out / "manifest.json").is_file()


def test_report(built: tuple[Path, subprocess.CompletedProcess[bytes]], tmp_path: Path) -> None:
    out, _ = built
    done = data(tmp_path, "report", out)
    assert done.returncode == 0, done.stderr.decode()
    for name in ("counts.png", "lengths.png", "removed.png"):
        assert (out / name).read_bytes().startswith(_PNG)
    as_json = data(tmp_path, "report", out, "--json", "--no-plots")
    assert json.loads(as_json.stdout) == json.loads((out / "report.json").read_text())


def test_inspect_marks_what_is_trained_on(
    built: tuple[Path, subprocess.CompletedProcess[bytes]], tmp_path: Path
) -> None:
    out, _ = built
    done = data(tmp_path, "inspect", out, "--source", "notes")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "<s> BEGINNING OF CONVERSATION: USER: ping GPT:⟦ pong</s>⟧\n"
    assert b"notes.jsonl:1" in done.stderr
    assert data(tmp_path, "inspect", out, "--random").stdout.count(b"<s>") == 1
    bad = data(tmp_path, "inspect", out, "--index", "100000")
    assert bad.returncode == 1 and b"there are" in bad.stderr
    bad = data(tmp_path, "inspect", out, "--source", "hh2")
    assert bad.returncode == 1 and b"sharegpt" in bad.stderr


def test_a_tokenizer_of_ones_own_reads_a_corpus_of_plain_text(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"text": f"The koala sits beside {n} grey stones."}) + "\n" for n in range(50)))
    made = data(tmp_path, "tokenizer", mine, "--size", "440", "-o", tmp_path / "tokenizer")
    assert made.returncode == 0, made.stderr.decode()
    assert b"440 pieces, made of 50 lines" in made.stderr and not made.stdout
    done = data(tmp_path, "build", mine, "--tokenizer", tmp_path / "tokenizer", "-o", tmp_path / "corpus")
    assert done.returncode == 0, done.stderr.decode()
    shown = data(tmp_path, "inspect", tmp_path / "corpus", "--index", "7")
    assert shown.stdout.decode() == "<s>⟦ The koala sits beside 7 grey stones.</s>⟧\n"


def test_without_a_test_set_it_says_so(raw: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    row = {"messages": [{"role": "user", "content": TESTED}, {"role": "assistant", "content": "\x1b]52;c;eA==\x07"}]}
    mine.write_text(json.dumps(row))
    out = tmp_path / "out"
    done = data(tmp_path, "build", mine, "--tokenizer", raw / "tokenizer.model", "-o", out)
    assert done.returncode == 0, done.stderr.decode()
    assert "NOT DECONTAMINATED: no test set was given (--test-set FILE)" in " ".join(done.stdout.decode().split())
    shown = data(tmp_path, "inspect", out)
    assert shown.returncode == 0 and b"\x1b" not in shown.stdout
    test_set = raw / "eval" / "koala_test_set.jsonl"
    none = data(
        tmp_path, "build", mine, "--tokenizer", raw / "tokenizer.model", "-o", out, "--force", "--test-set", test_set
    )
    assert none.returncode == 1 and b"nothing is left" in none.stderr
    assert none.stderr.endswith(b"hint: contaminated: 1\n")
    assert (out / "dialogues.jsonl").is_file()  # the old one


@pytest.mark.parametrize(
    ("number", "status", "workers"), [(signal.SIGINT, 130, 1), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2)]
)
def test_a_signal_ends_a_build_and_it_says_what_is_kept(
    raw: Path, tmp_path: Path, number: int, status: int, workers: int
) -> None:
    """A terminal sends Ctrl-C to the workers, too; other signals reach the program alone."""
    row = json.dumps({"instruction": "How many stones?", "input": "", "output": "Grey ones. " * 40}) + "\n"
    (tmp_path / "long.jsonl").write_text(row * 60_000)
    (tmp_path / "short.jsonl").write_text(row)
    (tmp_path / "two.toml").write_text(
        '[sources.short]\nfiles = ["short.jsonl"]\n[sources.long]\nfiles = ["long.jsonl"]\n'
    )
    command = [KOALA, "data", "build", tmp_path / "two.toml", "--tokenizer", raw / "tokenizer.model", "-o"]
    program = subprocess.Popen(
        [*map(str, command), tmp_path / "out", "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"KOALA_HOME": str(tmp_path)},
    )
    stages = tmp_path / ".out.partial" / "stages"
    while not list(stages.glob(".long*.partial")) and program.poll() is None:
        time.sleep(0.01)
    (os.killpg if number == signal.SIGINT else os.kill)(program.pid, number)
    try:
        out, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert (program.returncode, out) == (status, b"")
    assert errors == b"stopped; the same command goes on behind the sources that are done\n"
    assert sorted(path.name.partition("-")[0] for path in stages.iterdir()) == ["short", "short"]


@pytest.mark.parametrize(
    ("arguments", "status", "what"),
    [
        (["build", "koala-al", "--tokenizer", "{raw}/tokenizer.model", "-o", "{out}"], 1, b"koala-all"),
        (["build", "koala-all", "--tokenizer", "{raw}/tokenizer.model", "-o", "{out}", "--raw", "{raw}"], 1, b"OIG"),
        (["build", "koala-all", "--tokenizer", "{raw}/none", "-o", "{out}"], 2, b"none"),
        (["build", "{raw}/mine.toml", "--tokenizer", "{raw}/mine.toml", "-o", "{out}"], 1, b"tokenizer"),
        (["build", "koala-all"], 2, b"--tokenizer"),
        (["tokenizer", "{raw}/notes.jsonl", "-o", "{out}"], 2, b"--size"),
        (["tokenizer", "--size", "600", "-o", "{out}"], 2, b"FILES"),
        (["tokenizer", "{raw}/notes.jsonl", "--size", "0", "-o", "{out}"], 2, b"--size"),
        (["tokenizer", "{raw}/notes.jsonl", "--size", "100", "-o", "{out}"], 1, b"larger size"),
        (["tokenizer", "{raw}/notes.jsonl", "--size", "6000", "-o", "{out}"], 1, b"smaller size"),
        (["tokenizer", "{raw}/mine.toml", "--size", "600", "-o", "{out}"], 1, b"plain {"),
        (["tokenizer", "{raw}/notes.jsonl", "--size", "600", "-o", "{raw}"], 1, b"exists already"),
        (["report", "{raw}"], 1, b"no corpus"),
        (["inspect", "{raw}"], 1, b"corpus"),
    ],
)
def test_errors(raw: Path, tmp_path: Path, arguments: list[str], status: int, what: bytes) -> None:
    done = data(tmp_path, *(word.format(raw=raw, out=tmp_path / "out") for word in arguments))
    assert done.returncode == status, done.stderr.decode()
    assert what in done.stderr and b"Traceback" not in done.stderr
    assert not list(tmp_path.glob("*out*"))
