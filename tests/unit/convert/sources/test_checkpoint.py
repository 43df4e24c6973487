"""Every format holds the same model: its tensors are, bit for bit, those of transformers' own state dict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from koala_local.convert.sources.architecture import Checkpoint
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.sources.gguf_names import gguf_name
from torch.serialization import skip_data
from transformers import LlamaForCausalLM

from tests.checkpoint_maker import make_easylm, make_gguf, make_hf, make_meta
from tests.gguf_maker import write_settings

State = dict[str, torch.Tensor]
KV_HEADS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("model") / "hf", kv_heads=KV_HEADS)


@pytest.fixture(scope="module")
def state(folder: Path) -> State:
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def sharded(at: Path, state: State) -> Path:
    return make_hf(at, kv_heads=KV_HEADS, shards=3)


def one_bin(at: Path, state: State) -> Path:
    return make_hf(at, kv_heads=KV_HEADS, kind="bin")


def bin_shards(at: Path, state: State) -> Path:
    return make_hf(at, kv_heads=KV_HEADS, kind="bin", shards=2)


def single_file(at: Path, state: State) -> Path:
    return make_hf(at, kv_heads=KV_HEADS) / "model.safetensors"


def meta(at: Path, state: State) -> Path:
    return make_meta(at, state, kv_heads=KV_HEADS)


def meta_parts(at: Path, state: State) -> Path:
    return make_meta(at, state, kv_heads=KV_HEADS, parts=2)


def meta_parts_by_rows(at: Path, state: State) -> Path:
    return make_meta(at, state, kv_heads=KV_HEADS, parts=2, split_embedding="rows")


def easylm(at: Path, state: State) -> Path:
    return make_easylm(at, state, kv_heads=KV_HEADS)


def easylm_chunks(at: Path, state: State) -> Path:
    return make_easylm(at, state, kv_heads=KV_HEADS, chunk_bytes=1000, prefix=("params", "params"))


def gguf_bf16(at: Path, state: State) -> Path:
    return make_gguf(at, state, kv_heads=KV_HEADS, kind=gguf.GGMLQuantizationType.BF16)


def gguf_f32(at: Path, state: State) -> Path:
    return make_gguf(at, state, kv_heads=KV_HEADS)


SOURCES = [sharded, one_bin, bin_shards, single_file, meta, meta_parts, meta_parts_by_rows]
SOURCES += [easylm, easylm_chunks, gguf_bf16, gguf_f32]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_a_source_gives_the_tensors_of_transformers(
    tmp_path: Path, state: State, source: Callable[[Path, State], Path]
) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "there", state), head_size=16)
    assert list(checkpoint.tensors) == sorted(state, key=running_order)
    for name, info in checkpoint.tensors.items():
        found = checkpoint.read(name)
        assert info.shape == tuple(found.shape) == tuple(state[name].shape)
        assert {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype] == found.dtype
        assert torch.equal(found.float(), state[name].float()), name
    check_rows(checkpoint)
    config = checkpoint.config
    assert (config.architecture, config.heads, config.kv_heads) == ("LlamaForCausalLM", 4, KV_HEADS)
    assert (config.hidden_size, config.head_size, config.feed_forward_size, config.layers) == (64, 16, 128, 2)
    assert config.norm_epsilon == pytest.approx(1e-6)
    assert (config.rope_base, dict(config.rope_scaling), config.tied_embeddings) == (10000.0, {}, False)


def running_order(name: str) -> tuple[int, int, int]:
    """Where a name stands when a model runs: written out here on its own."""
    within = ["input_", "q_proj", "k_proj", "v_proj", "o_proj", "post_", "gate", "up", "down"]
    if "layers" not in name:
        return (0 if "embed" in name else 2 if "norm" in name else 3, 0, 0)
    return 1, int(name.split(".")[2]), next(rank for rank, part in enumerate(within) if part in name)


def check_rows(checkpoint: Checkpoint) -> None:
    """Rows read alone equal those of the whole, at, across and beside the borders of heads and parts."""
    for name, info in checkpoint.tensors.items():
        whole, rows = checkpoint.read(name), info.shape[0]
        for start, stop in (
            (0, 1),
            (0, rows),
            (7, 25),
            (15, 16),
            (rows // 2 - 1, rows // 2 + 1),
            (rows - 1, rows),
            (5, 5),
        ):
            assert torch.equal(checkpoint.read(name, slice(start, stop)), whole[start:stop]), (name, start, stop)
        assert torch.equal(checkpoint.read(name, slice(-3, None)), whole[-3:])


def test_what_was_read_can_be_changed_and_the_file_stays(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = checkpoint.read("model.norm.weight").clone()
    checkpoint.read("model.norm.weight").mul_(0)
    assert torch.equal(checkpoint.read("model.norm.weight"), before)


def test_quantized_gguf_is_dequantized(tmp_path: Path, state: State) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    checkpoint = open_checkpoint(make_gguf(tmp_path / "q.gguf", state, kv_heads=KV_HEADS, kind=kind))
    for name, info in checkpoint.tensors.items():
        assert info.dtype == "F32"
        found, true = checkpoint.read(name), state[name].float()
        if true.dim() == 2:
            raw = gguf.quants.quantize(true.numpy(), kind)  # q and k: permuting rows commutes with quantizing them
            true = torch.from_numpy(gguf.quants.dequantize(raw, kind))
        assert torch.equal(found, true), name
    check_rows(checkpoint)


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_hf(tmp_path / "tied", tied=True))
    assert checkpoint.config.tied_embeddings and "lm_head.weight" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": None, "rope_theta": 500000.0}, {"rope_base": 500000.0}),
        ({"rope_parameters": None, "rope_theta": None}, {"rope_base": 10000.0}),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_base": 5e5},
        ),
        ({"num_key_value_heads": None, "head_dim": None}, {"kv_heads": 4, "head_size": 16}),
        ({"architectures": ["LLaMAForCausalLM"]}, {"architecture": "LlamaForCausalLM"}),
        (
            {"architectures": None, "model_type": "mistral"},
            {"architecture": "MistralForCausalLM", "sliding_window": 4096},
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": None},
            {"architecture": "MistralForCausalLM", "sliding_window": None},
        ),
        ({"eos_token_id": [2, 9], "bos_token_id": None}, {"eos": (2, 9), "bos": None}),
        ({"max_position_embeddings": None, "max_sequence_length": 999}, {"context": 999}),
    ],
)
def test_old_and_new_spellings_of_the_configuration(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder = make_hf(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    config = open_checkpoint(folder).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_llama_3s_table_in_a_gguf_becomes_its_scaling_again(tmp_path: Path, state: State) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / frequencies
    extra = {"rope_freqs.weight": factors}
    found = open_checkpoint(make_gguf(tmp_path / "a.gguf", state, kv_heads=KV_HEADS, extra=extra)).config.rope_scaling
    assert dict(found) == pytest.approx({"rope_type": "llama3", **scaling})


MEMORY = """
import sys
from pathlib import Path
from koala_local.convert.sources.checkpoint import open_checkpoint

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024

checkpoint = open_checkpoint(Path(sys.argv[1]))
checkpoint.read("model.norm.weight")
before, peak, total = anonymous(), 0, 0
for name, info in checkpoint.tensors.items():
    for start in range(0, info.shape[0], 1024):
        block = checkpoint.read(name, slice(start, start + 1024))
        peak, total = max(peak, anonymous()), total + block.nbytes
print(peak - before, total >> 20)
"""


def hollow_safetensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def hollow_bin(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    (folder / "model.safetensors").unlink()
    with skip_data():
        torch.save({name: torch.empty(shape) for name, shape in shapes.items()}, folder / "pytorch_model.bin")
    return folder


def hollow_gguf(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer, layers=3, hidden=2048, feed_forward=4096, heads=4, kv_heads=4)
    size = 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel() * 4
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), count)
        size += gguf.GGUFWriter.ggml_pad(count, gguf.GGUF_DEFAULT_ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT) + size)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("hollow", [hollow_safetensors, hollow_bin, hollow_gguf], ids=lambda made: made.__name__)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, hollow: Callable[[Path, dict[str, tuple[int, ...]]], Path]
) -> None:
    """A file of 650 MB, most of it a hole on the disk. What the allocator keeps of blocks in use is some of 16 MB."""
    folder = make_hf(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    wide = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 3, "head_dim": 512, "vocab_size": 9000}
    (folder / "config.json").write_text(json.dumps(settings | wide))
    sizes = {"q": (2048, 2048), "k": (2048, 2048), "v": (2048, 2048), "o": (2048, 2048)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (9000, 2048), "lm_head.weight": (9000, 2048)}
    shapes["model.norm.weight"] = (2048,)
    for layer in range(3):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in sizes.items()}
        shapes |= {f"{at}{name}.weight": (2048,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}mlp.{name}_proj.weight": (4096, 2048) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (2048, 4096)}
    command = [sys.executable, "-c", MEMORY, str(hollow(folder, shapes))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    grown, read = map(int, result.stdout.split())
    assert read > 600
    assert grown < read // 3
