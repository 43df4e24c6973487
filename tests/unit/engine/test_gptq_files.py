"""GPTQ folders that are damaged, hostile, or of another kind."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_local.engine.gptq import load_gptq
from koala_local.errors import ModelFileError
from tests.gptq_maker import CONTEXT, Made, make_gptq


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_gptq(tmp_path_factory.mktemp("made") / "koala-4bit")


def damaged(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "bad")


def change_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1 << 30}, "layers"),
        ({"vocab_size": 400}, "embed_tokens"),
        ({"intermediate_size": 128}, "gate_proj"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "."),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method"),
        ({"quantization_config": {"bits": 5, "group_size": 32}}, "bits"),
        ({"quantization_config": {"bits": 4, "group_size": 0}}, "group_size"),
        ({"quantization_config": {"bits": 4, "group_size": 64}}, "shape"),
        ({"quantization_config": {"bits": 3, "group_size": 32}}, "qweight"),
        ({"quantization_config": {"bits": 4, "group_size": 32, "checkpoint_format": "marlin"}}, "checkpoint_format"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(
    made: Made, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = damaged(made, tmp_path)
    change_json(folder / "config.json", **changes)
    with pytest.raises(ModelFileError, match=message):
        load_gptq(folder, CONTEXT)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(made: Made, tmp_path: Path, name: str) -> None:
    folder = damaged(made, tmp_path)
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=name.removeprefix("model.")):
        load_gptq(folder, CONTEXT)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 64, b"[]"], ids=["empty", "zeros", "ones", "list"])
def test_a_damaged_file_is_named(made: Made, tmp_path: Path, name: str, content: bytes) -> None:
    folder = damaged(made, tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=name):
        load_gptq(folder, CONTEXT)


def test_a_truncated_file_is_refused(made: Made, tmp_path: Path) -> None:
    folder = damaged(made, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        load_gptq(folder, CONTEXT)


def test_a_pickle_is_not_opened(made: Made, tmp_path: Path) -> None:
    folder = damaged(made, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "gptq_model-4bit-128g.bin").write_bytes(pickle.dumps(0))
    with pytest.raises(ModelFileError, match="pickle"):
        load_gptq(folder, CONTEXT)


@pytest.mark.parametrize("name", ["../made.safetensors", "/etc/passwd", "..", "a\\b", "missing.safetensors", "x.bin"])
def test_an_index_leads_nowhere_else(made: Made, tmp_path: Path, name: str) -> None:
    folder = damaged(made, tmp_path)
    (folder / "x.bin").write_bytes(b"")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError):
        load_gptq(folder, CONTEXT)


def test_a_link_out_of_the_folder_is_refused(made: Made, tmp_path: Path) -> None:
    folder = damaged(made, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelFileError, match="link"):
        load_gptq(folder, CONTEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.up_proj.g_idx", torch.full((64,), 2, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(8, 96)),
        ("model.layers.0.mlp.up_proj.bias", torch.ones(96)),
        ("model.norm.weight", torch.ones(64, dtype=torch.int32)),
        ("model.norm.weight", torch.full((64,), torch.nan)),
        ("model.layers.1.mlp.up_proj.scales", torch.full((2, 96), torch.inf).half()),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(made: Made, tmp_path: Path, name: str, value: torch.Tensor) -> None:
    folder = damaged(made, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: value}, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=name.rpartition(".")[0]):
        load_gptq(folder, CONTEXT)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no folder"):
        load_gptq(tmp_path / "none", CONTEXT)
