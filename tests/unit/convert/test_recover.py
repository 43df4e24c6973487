"""A base and a difference become a model again, in a folder that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import torch
from koala_local.convert.recover import known_checksums, recover, sum_checkpoint
from koala_local.convert.sources.checkpoint import open_checkpoint
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from koala_local.errors import KoalaError, ModelFileError
from tests.checkpoint_maker import make_easylm, make_gguf, make_hf, make_meta, save_state

State = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "llama", seed=1, shards=2)


@pytest.fixture
def diff(tmp_path: Path) -> State:
    return load_file(make_hf(tmp_path / "difference", seed=2) / "model.safetensors")


def weights(folder: Path) -> State:
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def added(base: State, diff: State, dtype: torch.dtype = torch.bfloat16) -> State:
    return {name: (base[name].float() + diff[name].float()).to(dtype) for name in base}


def check_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_sum_is_a_checkpoint_that_transformers_runs(tmp_path: Path, base: Path, diff: State) -> None:
    stream = make_easylm(tmp_path / "koala_diff", diff)
    seen: list[tuple[str, int, int]] = []
    result = recover(
        open_checkpoint(base),
        open_checkpoint(stream, head_size=16),
        tmp_path / "koala",
        shard_bytes=60_000,
        progress=lambda *step: seen.append(step),
    )
    expected = added(weights(base), diff)
    check_same(weights(tmp_path / "koala"), expected)
    assert result.dtype == "BF16" and result.size == sum(tensor.nbytes for tensor in expected.values())
    assert len(result.files) > 2 and all(path.stat().st_size < 70_000 for path in result.files)
    assert seen[-1][1:] == (result.size, result.size) and len(seen) == len(expected)
    assert not list(tmp_path.rglob("*.partial"))
    check_logits(tmp_path / "koala", base, expected)
    check_tokenizer(tmp_path / "koala", base)


def check_logits(folder: Path, base: Path, expected: State) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    reference: Any = LlamaForCausalLM.from_pretrained(base)
    reference.load_state_dict(expected)
    ids = torch.tensor([[1, 17, 300, 4, 99]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def check_tokenizer(folder: Path, base: Path) -> None:
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    named = json.loads((folder / "special_tokens_map.json").read_text())
    assert (named["bos_token"], named["eos_token"], named["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_transformers_reads_the_tokenizer(tmp_path: Path, base: Path, diff: State) -> None:
    pytest.importorskip("google.protobuf", reason="transformers needs it to read a tokenizer.model")
    (base / "special_tokens_map.json").write_text("{}")
    recover(open_checkpoint(base), open_checkpoint(tmp_path / "difference"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    assert tokenizer("Koalas sleep").input_ids == [1, *pieces.encode("Koalas sleep")]


def test_every_pair_of_formats_gives_the_same_sum(tmp_path: Path, base: Path, diff: State) -> None:
    llama = weights(base)
    kind = gguf.GGMLQuantizationType.BF16
    bases = [
        make_meta(tmp_path / "meta", llama, parts=2),
        make_easylm(tmp_path / "llama_stream", llama),
        make_gguf(tmp_path / "llama.gguf", llama, kind=kind),
    ]
    differences = [tmp_path / "difference", make_easylm(tmp_path / "stream", diff)]
    for number, (here, there) in enumerate(product(bases, differences)):
        first, second = (open_checkpoint(path, head_size=16) for path in (here, there))
        out = tmp_path / f"out{number}"
        recover(first, second, out, tokenizer_folder=base, dtype="BF16")  # a GGUF's norms are in 32 bits
        check_same(weights(out), added(llama, diff))


@pytest.mark.parametrize(("dtype", "type_"), [("F16", torch.float16), ("F32", torch.float32)])
def test_the_type_can_be_chosen(tmp_path: Path, base: Path, diff: State, dtype: Any, type_: torch.dtype) -> None:
    difference = open_checkpoint(tmp_path / "difference")
    result = recover(open_checkpoint(base), difference, tmp_path / "out", dtype=dtype)
    assert result.dtype == dtype
    check_same(weights(tmp_path / "out"), added(weights(base), diff, type_))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == str(type_).removeprefix("torch.")


def test_the_sum_can_be_read_without_being_written(tmp_path: Path, base: Path, diff: State) -> None:
    both = sum_checkpoint(open_checkpoint(base), open_checkpoint(tmp_path / "difference"))
    expected = added(weights(base), diff)
    for name in both.tensors:
        assert torch.equal(both.read(name), expected[name])
        assert torch.equal(both.read(name, slice(3, 30)), expected[name][3:30])
    assert both.tokenizer_folder == base and "difference" in both.description


def test_a_difference_of_another_size_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    for number, (options, words) in enumerate(
        [
            ({"extra_rows": 1}, "model.embed_tokens.weight of 340 x 64.*341 x 64"),
            ({"layers": 3}, "model.norm.weight of 64.*model.layers.2.input_layernorm.weight"),
            ({"feed_forward": 192}, "model.layers.0.mlp.gate_proj.weight of 128 x 64"),
            ({"tied": True}, "lm_head.weight.*no further tensor"),
        ]
    ):
        other = open_checkpoint(make_hf(tmp_path / f"other{number}", **options))  # type: ignore[arg-type]
        with pytest.raises(ModelFileError, match=words):
            recover(open_checkpoint(base), other, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_is_refused_and_kept(tmp_path: Path, base: Path, diff: State) -> None:
    difference = open_checkpoint(tmp_path / "difference")
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("kept")
        with pytest.raises(KoalaError, match="exists"):
            recover(open_checkpoint(base), difference, tmp_path / "out")
        assert (tmp_path / name / "mine").read_text() == "kept"
        (tmp_path / name).rename(tmp_path / "aside" if name == "out" else tmp_path / "aside2")


def test_a_sum_that_is_not_finite_leaves_nothing(tmp_path: Path, base: Path, diff: State) -> None:
    diff["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_state(tmp_path / "difference", diff)
    with pytest.raises(ModelFileError, match=r"model.layers.1.mlp.up_proj.weight.*not a finite"):
        recover(open_checkpoint(base), open_checkpoint(tmp_path / "difference"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_known_checksum_is_checked(tmp_path: Path, base: Path, diff: State) -> None:
    path = make_easylm(tmp_path / "stream", diff)
    stream = open_checkpoint(path, head_size=16)
    with pytest.raises(ModelFileError, match="stream has the SHA-256"):
        recover(open_checkpoint(base), stream, tmp_path / "out", checksums={path: "0" * 64})
    assert not list(tmp_path.glob("out*"))
    known = {path: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert recover(open_checkpoint(base), stream, tmp_path / "out", checksums=known).verified == (path,)


def test_meta_s_checklist_is_believed(tmp_path: Path) -> None:
    weights, other = tmp_path / "consolidated.00.pth", tmp_path / "params.json"
    weights.write_bytes(b"weights")
    other.write_bytes(b"{}")
    lines = (
        f"{hashlib.md5(b'weights').hexdigest()}  consolidated.00.pth\nno line\n{'0' * 32}  gone.pth\n{'0' * 32}  ../x\n"
    )
    (tmp_path / "checklist.chk").write_text(lines)
    assert known_checksums(tmp_path) == {weights: hashlib.md5(b"weights").hexdigest()}
    assert known_checksums(weights) == {}


def test_another_md5_is_an_error(tmp_path: Path, base: Path, diff: State) -> None:
    stream = open_checkpoint(make_easylm(tmp_path / "stream", diff), head_size=16)
    weights = next(base.glob("*.safetensors"))
    known = {weights: hashlib.md5(weights.read_bytes()).hexdigest()}
    assert recover(open_checkpoint(base), stream, tmp_path / "out", checksums=known).verified == (weights,)
    with pytest.raises(ModelFileError, match="MD5"):
        recover(open_checkpoint(base), stream, tmp_path / "out2", checksums={weights: "0" * 32})


def test_without_a_tokenizer_nothing_is_written(tmp_path: Path, base: Path, diff: State) -> None:
    (base / "tokenizer.model").unlink()
    stream = open_checkpoint(make_easylm(tmp_path / "stream", diff), head_size=16)
    with pytest.raises(ModelFileError, match="tokenizer"):
        recover(open_checkpoint(base), stream, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_no_disk_space_leaves_nothing(tmp_path: Path, base: Path, diff: State) -> None:
    both = open_checkpoint(base), open_checkpoint(tmp_path / "difference")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(KoalaError, match="cannot be written"):
            recover(*both, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("out*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.recover import recover

folder = Path(sys.argv[1])
steps = int(sys.argv[2])
def progress(*step):
    global steps
    steps -= 1
    if not steps:
        os.kill(os.getpid(), signal.SIGKILL)
recover(open_checkpoint(folder / "llama"), open_checkpoint(folder / "difference"), folder / "out", progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_on_the_way_there_is_nothing_under_the_final_name(tmp_path: Path, base: Path, diff: State) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "7"]
    result = subprocess.run(command, capture_output=True, timeout=120, check=False, env={**os.environ})
    assert result.returncode == -9, result.stderr
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
