"""One `koala quantize` from within: which sample it takes, and what it says before it works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.convert.job import (
    Options,
    _calibration_sample,
    _vocabulary,
    open_job,
    quantize_to_gguf,
    quantize_to_gptq,
)
from koala_local.convert.sources.checkpoint import open_checkpoint
from safetensors.torch import load_file

from koala_local.errors import KoalaError
from koala_local.nano import MODEL_PATH
from tests.checkpoint_maker import make_easylm, make_hf


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


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"kind": "Q9"}, "unknown quantization type 'Q9'"),
        ({"overrides": ("foo=Q8_0",)}, "decides no tensor"),
        ({"output": "taken.gguf"}, r"taken\.json exists already, and the report would replace it"),
        ({"output": "full.gguf"}, "no space for full.gguf"),
        ({"output": "model.json"}, r"model\.json is where the report goes"),
        ({"output": "taken.json/out.gguf"}, r"cannot write to taken\.json: not a folder"),
        ({"layout": "gptq", "tokenizer": None}, "a GPTQ folder needs them"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_calibrates(
    folder: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], refused: str
) -> None:
    (tmp_path / "taken.json").write_text("precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("koala_local.convert.job._calibration_sample", lambda _: pytest.fail("it began to work"))
    if changes.get("output") == "full.gguf":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    output = Path(str(changes.get("output", "out")))
    wanted = options(**(changes | {"output": output, "calibration": digits}))
    work, source = (quantize_to_gptq, MODEL_PATH) if wanted.layout == "gptq" else (quantize_to_gguf, folder)
    with pytest.raises(KoalaError, match=refused):
        work(source, wanted)
    assert (tmp_path / "taken.json").read_text() == "precious"


@pytest.mark.parametrize("layout", ["gguf", "gptq"])
def test_an_output_gets_its_name_with_its_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    out, work = tmp_path / "out", quantize_to_gptq if layout == "gptq" else quantize_to_gguf
    wanted = options(layout=layout, output=out, no_verify=True, group_size="32")
    with monkeypatch.context() as patch:
        patch.setattr("koala_local.convert.job.save_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work(folder, wanted)
    assert not out.exists()
    work(folder, wanted)
    kept = {"gguf": {"out", "out.json", "out.md"}, "gptq": {"out"}}[layout]
    assert {path.name for path in tmp_path.iterdir()} == kept
    report = json.loads((out / "quantization.json" if layout == "gptq" else tmp_path / "out.json").read_text())
    assert [fit["kv_type"] for fit in report["fits"]] == (["f16"] if layout == "gptq" else ["f16", "q8_0"])


def test_a_report_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.md").mkdir()
    with pytest.raises(OSError, match=r"out\.md"):
        quantize_to_gguf(folder, options(output=tmp_path / "out.gguf", no_verify=True, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out.md"]


def test_a_streams_heads_are_those_of_its_base(tmp_path: Path) -> None:
    """Such as Koala's difference: it holds no sizes of its own."""
    base = make_hf(tmp_path / "base", layers=1)
    state = load_file(base / "model.safetensors")
    stream = make_easylm(tmp_path / "difference", state)
    job = open_job(stream, options(base=base))
    assert job.checkpoint.config.head_size == open_checkpoint(base).config.head_size != 128
    for name, tensor in state.items():
        assert torch.equal(job.checkpoint.read(name).float(), (2 * tensor.float()).to(tensor.dtype).float()), name


def test_a_folder_is_no_place_for_a_gguf(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koala_local.convert.job._write_gguf", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(KoalaError, match="is a folder"):
        quantize_to_gguf(folder, options(output=tmp_path, force=True))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--calibration", __file__, "--imatrix", __file__],
        ["--group-size", "64"],
        ["--bits", "4", "--type", "Q4_K_M"],
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
