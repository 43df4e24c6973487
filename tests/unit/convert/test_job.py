"""One `koala quantize` from within: which sample it takes, and what it says before it works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from koala_local.convert.job import (
    Options,
    _calibration_sample,
    _vocabulary,
    open_job,
    quantize_to_gguf,
    quantize_to_gptq,
)

from koala_local.errors import KoalaError
from koala_local.nano import MODEL_PATH
from tests.checkpoint_maker import make_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("job") / "model", layers=1, context=4096)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """More tokens than any sample takes: each digit is one."""
    path = tmp_path / "digits.txt"
    path.write_text("0123456789\n" * 30_000)
    return path


def options(**changes: Any) -> Options:
    fields: dict[str, Any] = {
        "output": None, "bits": "4", "layout": "gguf", "group_size": None, "kind": None, "base": None,
        "tokenizer": None, "calibration": None, "imatrix": None, "overrides": (), "no_verify": False, "threads": None,
        "force": False, "as_json": False,
    }  # fmt: skip
    return Options(**(fields | changes))


@pytest.mark.parametrize(("layout", "count", "length"), [("gptq", 128, 2048), ("gguf", 64, 512)])
def test_a_large_file_fills_the_sample(folder: Path, digits: Path, layout: str, count: int, length: int) -> None:
    sample = _calibration_sample(open_job(folder, options(layout=layout, calibration=digits)))
    assert [len(ids) for ids in sample.sequences] == [length] * count
    assert sample.repeats < 1 and sample.source == "digits.txt"


class Working(Exception):
    """What stands in for the work raises it, with what was said until then."""


@pytest.mark.parametrize(
    ("work", "changes", "sample"),
    [
        ("importance.importance_matrix", {}, r"calibration: 64 x 512 tokens from digits\.txt"),
        ("gptq.checkpoint.quantize_gptq", {"layout": "gptq"}, r"calibration: 128 x 2,048 tokens from digits\.txt"),
        ("proof.streamed_logits", {"calibration": None}, r"verification: \d+ x 512 tokens from the built-in held-out"),
    ],
)
def test_what_a_sample_takes_is_said_before_the_work(
    folder: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    work: str,
    changes: dict[str, Any],
    sample: str,
) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise Working(capsys.readouterr().err)

    monkeypatch.setattr(f"koala_local.convert.{work}", begin)
    wanted = options(**({"output": tmp_path / "out", "calibration": digits} | changes))
    cost = r"[\d,]+ tokens, about [\d.]+ (s|min|h), at most about [\d.]+ [MG]B of memory"
    with pytest.raises(Working, match=f"{sample}.*; {cost}"):
        (quantize_to_gptq if wanted.layout == "gptq" else quantize_to_gguf)(folder, wanted)


def test_a_folder_with_one_gguf_stands_for_the_file(tmp_path: Path) -> None:
    only = tmp_path / "downloaded" / "small.gguf"
    only.parent.mkdir()
    only.symlink_to(MODEL_PATH)
    job = open_job(only.parent, options())
    assert (job.source, job.out("q4_k_m.gguf").name) == (only, "small-q4_k_m.gguf")
    assert len(_vocabulary(job).tokens) == job.checkpoint.config.vocabulary_size
    (only.parent / "other.gguf").symlink_to(MODEL_PATH)
    with pytest.raises(KoalaError, match=r"holds 2 \.gguf files"):
        open_job(only.parent, options())


def test_a_folder_is_no_place_for_a_gguf(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koala_local.convert.job._write_gguf", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(KoalaError, match="is a folder"):
        quantize_to_gguf(folder, options(output=tmp_path, force=True))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--calibration", __file__, "--imatrix", __file__],
        ["--group-size", "64"],
        ["--format", "gptq", "--bits", "5"],
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys, click\n"
        "from koala_local.convert.command import quantize\n"
        "try: quantize.main(sys.argv[1:], standalone_mode=False)\n"
        "except click.UsageError: sys.exit(7 if 'torch' in sys.modules else 0)\n"
        "sys.exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, __file__, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
