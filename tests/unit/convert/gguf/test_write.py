"""Whole files: bytes against the installed library's quantizer, logits against transformers, and failures."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from koala_local.convert.gguf import write as converter
from koala_local.convert.gguf.kquants import BASE_TYPES, parse_overrides
from koala_local.convert.gguf.write import Progress, Report, write_gguf
from koala_local.convert.sources.architecture import Checkpoint, TensorInfo
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.vocabulary.read import Vocabulary, read_vocabulary
from transformers import LlamaForCausalLM

from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.configuration import ModelConfig
from tests.checkpoint_maker import make_hf
from tests.unit.convert.llama_quantize import llama_quantize, read_tensors

LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def convert(source: Path, out: Path, kind: str, *, vocabulary: Path | None = None, **options: Any) -> Report:
    checkpoint = open_checkpoint(source)
    tokens = read_vocabulary(vocabulary or source, checkpoint.config)
    return write_gguf(checkpoint, tokens, out, kind, threads=2, **options)


def importance_of(path: Path) -> dict[str, Any]:
    """A vector of made-up importances for every matrix in a layer."""
    random = np.random.default_rng(0)
    tensors = [item for item in gguf.GGUFReader(path).tensors if item.name.startswith("blk.") and len(item.shape) > 1]
    return {item.name: random.random(int(item.shape[0]), dtype=np.float32) + np.float32(0.01) for item in tensors}


@pytest.fixture(scope="module", params=["llama", "grouped", "uneven"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain in bfloat16; grouped heads, tied, in float32 with a padded vocabulary; columns that 256 does not divide."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shapes: dict[str, dict[str, Any]] = {
        "llama": {"layers": 4, "hidden": 256, "feed_forward": 512},
        "grouped": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2, "feed_forward": 256, "tied": True,
                    "dtype": torch.float32, "extra_rows": 4},
        "uneven": {"layers": 2, "hidden": 288, "feed_forward": 512, "dtype": torch.float16},
    }  # fmt: skip
    make_hf(folder, **shapes[request.param])
    convert(folder, folder.parent / "f32.gguf", "F32")
    return folder


@pytest.mark.parametrize("kind", [kind for kind in BASE_TYPES if kind != "F32"])
def test_one_pass_equals_llama_cpps_two(model: Path, tmp_path: Path, kind: str) -> None:
    report = convert(model, tmp_path / "ours.gguf", kind)
    expected = read_tensors(llama_quantize(model.parent / "f32.gguf", tmp_path / "theirs.gguf", kind))
    ours = read_tensors(tmp_path / "ours.gguf")
    assert ours == expected
    assert report.types == {name: type_ for name, (type_, _) in ours.items()}
    assert report.size == (tmp_path / "ours.gguf").stat().st_size
    assert report.bits_per_weight == pytest.approx(8 * sum(len(data) for _, data in ours.values()) / report.parameters)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q2_K", "Q6_K", "IQ4_XS"])
def test_with_an_importance_matrix_too(model: Path, tmp_path: Path, kind: str) -> None:
    importance = importance_of(model.parent / "f32.gguf")
    convert(model, tmp_path / "ours.gguf", kind, importance=importance)
    theirs = llama_quantize(model.parent / "f32.gguf", tmp_path / "theirs.gguf", kind, importance=importance)
    assert read_tensors(tmp_path / "ours.gguf") == read_tensors(theirs)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "model", layers=2, hidden=64, feed_forward=96, extra_rows=2)


def test_a_bfloat16_file_is_the_same_intermediate(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "bf16.gguf", "BF16")
    convert(small, tmp_path / "ours.gguf", "Q8_0")
    theirs = llama_quantize(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", "Q8_0")
    assert read_tensors(tmp_path / "ours.gguf") == read_tensors(theirs)


def test_overrides_and_notes(small: Path, tmp_path: Path) -> None:
    overrides = parse_overrides([r"blk\.0\.ffn_down=Q8_0", "attn_v=F16"])
    importance = {"blk.0.attn_q.weight": np.ones(64, np.float32), "token_embd.weight": np.ones(7, np.float32)}
    report = convert(small, tmp_path / "out.gguf", "Q4_K_M", overrides=overrides, importance=importance)
    assert report.types["blk.0.ffn_down.weight"] == "Q8_0"
    assert report.types["blk.1.ffn_down.weight"] == "Q5_0"  # Q4_K, whose blocks 96 columns do not fill
    assert report.types["blk.1.attn_v.weight"] == "F16"
    assert any("342 rows" in note for note in report.notes)
    assert any("do not divide" in note for note in report.notes)
    assert any("the importance matrix lacks 13" in note for note in report.notes)


def test_blocks_of_rows_change_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(small, tmp_path / "whole.gguf", "Q8_0")
    monkeypatch.setattr(converter, "_LARGEST_BLOCK", 1000)  # 15 rows; 16 rows, a whole head, in q and k
    seen: list[Progress] = []
    convert(small, tmp_path / "blocks.gguf", "Q8_0", progress=seen.append)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "blocks.gguf").read_bytes()
    assert len(seen) > 60
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == seen[-1].total
    assert {step.tensor for step in seen} == read_tensors(tmp_path / "blocks.gguf").keys()


# logits


def llama_logits(path: Path, tokens: list[int]) -> Any:
    """llama.cpp's logits of every position, (tokens, vocabulary)."""
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=2, flash_attn=False)
    try:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])
    finally:
        model.close()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2, "tied": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": LLAMA_3, "context": 512},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, "context": 256},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ],
    ids=["plain", "grouped-tied", "linear", "llama3", "yarn", "dynamic"],
)
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_hf(tmp_path / "model", layers=3, hidden=128, heads=8, dtype=torch.float32, **changes)
    report = convert(folder, tmp_path / "f32.gguf", "F32")
    tokens = torch.randint(0, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(folder)(tokens).logits[0].float().numpy()
    found = llama_logits(tmp_path / "f32.gguf", tokens[0].tolist())
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(expected).max() > 0.3
    assert any("dynamic" in note for note in report.notes) == (
        changes.get("rope_scaling", {}).get("rope_type") == "dynamic"
    )


def test_the_header_says_what_the_model_is(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "koala-tiny", kv_heads=2, context=640)
    convert(folder, tmp_path / "out.gguf", "Q4_K_M")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    expected = {
        "general.architecture": "llama", "general.name": "koala-tiny", "general.file_type": 15,
        "general.quantization_version": 2, "llama.context_length": 640, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 340, "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {key: fields[key].contents() for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(1e-6)
    assert fields["tokenizer.chat_template"].contents().count("GPT:") == 1
    assert "general.license" not in fields


def test_the_card_of_the_source_names_the_model_and_its_licence(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-card"
    shutil.copytree(small, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nmodel_name: Tiny One\n---\n")
    convert(folder, tmp_path / "out.gguf", "Q8_0")
    convert(tmp_path / "out.gguf", tmp_path / "again.gguf", "Q8_0", vocabulary=folder)
    for name in ("out.gguf", "again.gguf"):
        fields = gguf.GGUFReader(tmp_path / name).fields
        assert fields["general.name"].contents() == "Tiny One"
        assert fields["general.license"].contents() == "mit"


# failure


@dataclass
class Changed:
    """A checkpoint with some tensors replaced."""

    inner: Checkpoint
    config: ModelConfig
    replaced: Mapping[str, torch.Tensor | None]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        found = dict(self.inner.tensors)
        for name, tensor in self.replaced.items():
            found.pop(name, None)
            if tensor is not None:
                found[name] = TensorInfo(name, tuple(tensor.shape), "F32")
        return found

    @property
    def tokenizer_folder(self) -> Path | None:
        return self.inner.tokenizer_folder

    @property
    def description(self) -> str:
        return "changed"

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = self.replaced.get(name)
        if tensor is None:
            return self.inner.read(name, rows)
        return tensor if rows is None else tensor[rows]


def changed(folder: Path, replaced: Mapping[str, torch.Tensor | None] | None = None, **config: Any) -> Changed:
    inner = open_checkpoint(folder)
    return Changed(inner, replace(inner.config, **config), replaced or {})


def vocabulary_of(folder: Path) -> Vocabulary:
    return read_vocabulary(folder, open_checkpoint(folder).config)


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("replaced", "config", "message"),
    [
        ({QUERY: torch.full((64, 64), torch.nan)}, {}, "q_proj.weight holds NaN"),
        ({}, {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({}, {"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "factor"),
        ({}, {"rope_scaling": {"rope_type": "llama3", "factor": float("nan")}}, "factor"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    small: Path, tmp_path: Path, replaced: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelFileError, match=message):
        write_gguf(changed(small, replaced, **config), vocabulary_of(small), tmp_path / "out.gguf", "Q8_0", threads=2)
    assert sorted(tmp_path.iterdir()) == before


def test_a_vocabulary_of_another_size_is_refused(small: Path, tmp_path: Path) -> None:
    vocabulary = vocabulary_of(small)
    with pytest.raises(ModelFileError, match="341 tokens"):
        write_gguf(changed(small), replace(vocabulary, tokens=vocabulary.tokens[:-1]), tmp_path / "out.gguf", "F32")


def test_an_existing_file_needs_force(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with pytest.raises(KoalaError, match="exists already"):
        convert(small, out, "Q8_0")
    assert out.read_bytes() == b"old"
    convert(small, out, "Q8_0", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_old_file(small: Path, tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def stop(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise error

    before = sorted(tmp_path.iterdir())
    with pytest.raises(error):
        convert(small, out, "Q8_0", progress=stop, force=True)
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_pass_its_check_leaves_the_old_file(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    seen: list[bytes] = []

    def look(written: Path, made: Report) -> None:
        assert made.size == written.stat().st_size
        assert out.read_bytes() == b"old"
        seen.append(written.read_bytes())

    def refuse(*_: object) -> None:
        raise KoalaError("it is broken")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KoalaError, match="broken"):
        convert(small, out, "Q8_0", check=refuse, force=True)
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before
    convert(small, out, "Q8_0", check=look, force=True)
    assert seen == [out.read_bytes()]
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_told_before_anything_is_read(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    seen: list[Progress] = []
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KoalaError, match="no space"):
        convert(small, tmp_path / "out.gguf", "Q8_0", progress=seen.append)
    assert not seen
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_while_it_is_written_leaves_nothing(small: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(KoalaError, match=r"no space for out\.gguf in .*: File too large"):
            convert(small, tmp_path / "out.gguf", "F32", progress=seen.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < seen[-1].done < seen[-1].total
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_folder_is_made(small: Path, tmp_path: Path) -> None:
    assert convert(small, tmp_path / "new" / "models" / "out.gguf", "Q8_0").path.is_file()
    (tmp_path / "file").touch()
    with pytest.raises(KoalaError, match=r"cannot write to .*file"):
        convert(small, tmp_path / "file" / "out.gguf", "Q8_0")


KILLED = """
import sys, time
from pathlib import Path
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.gguf.write import write_gguf
from koala_local.convert.vocabulary.read import read_vocabulary
folder = Path(sys.argv[1])
source = open_checkpoint(folder)
def progress(step):
    if step.done > step.total // 2:
        print("half", flush=True)
        time.sleep(60)
write_gguf(source, read_vocabulary(folder, source.config), Path(sys.argv[2]), "Q8_0", threads=2, progress=progress)
"""


def test_kill_leaves_nothing_under_the_final_name_and_the_next_run_works(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(small), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        with pytest.raises(KoalaError, match="another run"):
            convert(small, out, "Q8_0")
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    convert(small, out, "Q8_0")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model", "out.gguf"]


def test_what_is_in_flight_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow writer does not let blocks pile up: reads stay within the queue's length of what was written."""
    folder = make_hf(tmp_path / "model", layers=2, hidden=64)
    monkeypatch.setattr(converter, "_LARGEST_BLOCK", 64 * 16)
    source = changed(folder)
    reads = 0
    inner_read = source.inner.read

    def read(name: str, rows: slice | None = None) -> torch.Tensor:
        nonlocal reads
        reads += 1
        return inner_read(name, rows)

    source.read = read  # type: ignore[method-assign]
    written, most = 0, 0

    def progress(_: Progress) -> None:
        nonlocal written, most
        written += 1
        time.sleep(0.002)
        most = max(most, reads - written)

    write_gguf(source, vocabulary_of(folder), tmp_path / "out.gguf", "F32", threads=3, progress=progress)
    assert 0 < most <= 4
    assert written == reads
