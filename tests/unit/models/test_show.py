from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from koala_local.errors import ModelFileError
from koala_local.models import show
from koala_local.models.devices import Machine
from koala_local.models.memory import Wish
from koala_local.models.safetensors_header import read_folder
from koala_local.nano import MODEL_PATH
from tests.gguf_maker import make_model

HERE = Machine(8 << 30, 16 << 30)


def test_the_bundled_model() -> None:
    about = show.describe(MODEL_PATH, HERE, Wish())
    assert (about.kind, about.architecture, about.layers, about.vocabulary) == ("gguf", "llama", 6, 3072)
    assert about.licence == "apache-2.0" and about.template
    assert sum(part.weights for part in about.tensor_types) == about.parameters
    assert sum(part.bytes for part in about.tensor_types) == about.bytes
    assert 4 < about.bits_per_weight < 6
    assert about.plan and not about.plan.problem
    assert json.loads(json.dumps(show.as_json(about)))["plan"]["bytes"]["ram"] == about.plan.parts.ram


def test_a_plan_that_does_not_fit_is_told_with_its_remedy(tmp_path: Path) -> None:
    about = show.describe(make_model(tmp_path / "m.gguf"), Machine(1 << 20, 1 << 20), Wish())
    assert about.plan
    rows = dict(show.plan_rows(about.plan))
    assert "RAM" in rows["does not fit"] and rows["remedy"]


def safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def gptq_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    }
    (folder / "config.json").write_text(json.dumps(config))
    entries = {
        "model.layers.0.self_attn.q_proj.qweight": {"dtype": "I32", "shape": [8, 64], "data_offsets": [0, 2048]},
        "model.layers.0.self_attn.q_proj.scales": {"dtype": "F16", "shape": [2, 64], "data_offsets": [2048, 2304]},
        "model.embed_tokens.weight": {"dtype": "F16", "shape": [100, 64], "data_offsets": [2304, 15104]},
        "__metadata__": {"format": "pt"},
    }
    safetensors(folder / "model.safetensors", entries, bytes(15104))
    return folder


def test_a_gptq_folder(tmp_path: Path) -> None:
    about = show.describe(gptq_folder(tmp_path / "model"), HERE, Wish())
    assert about.kind == "gptq" and about.quantization == "GPTQ 4 bits, groups of 32"
    assert about.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 100 * 64 + 64
    assert about.bytes == 15104 and about.plan is None and about.expected_ram
    assert {part.type: part.tensors for part in about.tensor_types} == {"I32": 1, "F16": 2}
    assert about.template is None
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default", "template": "D"}]}'
    )
    assert show.describe(tmp_path / "model", HERE, Wish()).template == "D"
    (tmp_path / "model" / "chat_template.jinja").write_text("J")
    assert show.describe(tmp_path / "model", HERE, Wish()).template == "J"
    (tmp_path / "model" / "chat_template.jinja").write_text("J" * (1 << 21))
    with pytest.raises(ModelFileError, match="larger than 1 MiB"):
        show.describe(tmp_path / "model", HERE, Wish())


def test_a_gptq_folder_in_the_cache_has_its_repositorys_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--TheBloke--koala-13B-GPTQ" / "snapshots" / ("a" * 40)
    folder.parent.mkdir(parents=True)
    assert show.describe(gptq_folder(folder), HERE, Wish()).name == "TheBloke/koala-13B-GPTQ"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"dtype": "F16", "shape": [4], "data_offsets": [0, 9]},
        {"dtype": "F16", "shape": [1 << 61], "data_offsets": [0, 1 << 62]},
        {"dtype": "F16", "shape": [-4], "data_offsets": [0, -8]},
        {"dtype": ["F16"], "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [4], "data_offsets": [8]},
    ],
)
def test_safetensors_that_lie_are_refused(tmp_path: Path, entry: object) -> None:
    safetensors(tmp_path / "model.safetensors", {"a": entry}, bytes(8))
    with pytest.raises(ModelFileError, match="'a'"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_broken_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError):
        read_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no safetensors"):
        read_folder(tmp_path)
