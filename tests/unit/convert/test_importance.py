"""The importance matrix against hooks on transformers' own model, and llama.cpp's two file formats."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from koala_local.convert.importance import importance_matrix, read_imatrix

from koala_local.errors import KoalaError, ModelFileError
from tests.unit.convert.in_memory import InMemory, random_ids, tiny

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def by_hooks(model: Any, batches: list[torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Squares of what every linear layer is given, summed by forward hooks in float64."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].double().square().sum((0, 1))

        return add

    for index, layer in enumerate(model.model.layers):
        for module, name in GGUF_NAMES.items():
            layer.get_submodule(module).register_forward_pre_hook(hook(f"blk.{index}.{name}.weight"))
    with torch.no_grad():
        for ids in batches:
            model(ids)
    tokens = sum(ids.numel() for ids in batches)
    return {name: (total / tokens).numpy() for name, total in sums.items()}


def test_it_equals_hooks_on_transformers_model() -> None:
    model, checkpoint = tiny(num_key_value_heads=2)
    batches = [random_ids(2, 40), random_ids(1, 23, seed=5)]
    got, want = importance_matrix(checkpoint, batches), by_hooks(model, batches)
    assert set(got) == set(want) and len(got) == 14
    for name, columns in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], columns, rtol=1e-5, atol=1e-9, err_msg=name)


def test_broken_activations_and_an_empty_text_are_errors() -> None:
    _, checkpoint = tiny()
    with pytest.raises(KoalaError, match="no tokens"):
        importance_matrix(checkpoint, [])
    broken = InMemory(checkpoint.config, checkpoint.state)
    broken.state["model.layers.1.self_attn.v_proj.weight"] = torch.full((64, 64), float("nan"))
    with pytest.raises(KoalaError, match="layer 1"):
        importance_matrix(broken, [random_ids(1, 8)])


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        raw = name.encode()
        data += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


def write_gguf(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """As llama-imatrix writes it: no architecture, three keys of its own."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_old_format_is_read(tmp_path: Path) -> None:
    file = tmp_path / "old.dat"
    tail = struct.pack("<ii", 4, 8) + b"text.txt"
    file.write_bytes(legacy({"blk.0.attn_q.weight": (4, [4.0, 8.0]), "blk.0.ffn_up.weight": (0, [0.5])}, tail))
    matrix = read_imatrix(file)
    assert {name: values.tolist() for name, values in matrix.items()} == {
        "blk.0.attn_q.weight": [1.0, 2.0],
        "blk.0.ffn_up.weight": [0.5],
    }


def test_the_gguf_format_is_read(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "new.gguf",
        {
            "blk.0.attn_q.weight.in_sum2": np.array([[1024, 512]], np.float32),
            "blk.0.attn_q.weight.counts": np.array([[512]], np.float32),
            "blk.0.ffn_up_exps.weight.in_sum2": np.array([[6, 4], [9, 9]], np.float32),
            "blk.0.ffn_up_exps.weight.counts": np.array([[2], [0]], np.float32),
        },
    )
    matrix = read_imatrix(file)
    assert matrix["blk.0.attn_q.weight"].tolist() == [2.0, 1.0]
    assert matrix["blk.0.ffn_up_exps.weight"].tolist() == [3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"blk.0.attn_q.weight": np.zeros(4, np.float32)}, "without an importance"),
        ({"a.in_sum2": np.zeros(4, np.float32)}, "no counts"),
        ({"a.in_sum2": np.zeros(4, np.float16), "a.counts": np.ones(1, np.float32)}, "F16"),
        ({"a.in_sum2": np.zeros(4, np.float32), "a.counts": np.ones(3, np.float32)}, "4 sums for 3"),
        ({"a.in_sum2": np.full(4, np.inf, np.float32), "a.counts": np.ones(1, np.float32)}, "no mean"),
        ({"a.in_sum2": np.full(4, -1, np.float32), "a.counts": np.ones(1, np.float32)}, "no mean"),
    ],
)
def test_unusable_gguf_files_are_refused(tmp_path: Path, tensors: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelFileError, match=what):
        read_imatrix(write_gguf(tmp_path / "bad.gguf", tensors))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        struct.pack("<i", 0),
        struct.pack("<i", 2**31 - 1),
        struct.pack("<ii", 1, 2**31 - 1),
        struct.pack("<ii", 1, -1),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2) + bytes(4),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", -1, 1) + bytes(4),
        legacy({"a": (1, [float("nan")])}),
        b"a text that somebody took for an importance matrix",
    ],
)
def test_unusable_old_files_are_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "bad.dat"
    file.write_bytes(data)
    with pytest.raises(ModelFileError):
        read_imatrix(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.dat", tmp_path):
        with pytest.raises(ModelFileError):
            read_imatrix(path)


@settings(max_examples=60, deadline=None)
@given(where=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 120))
def test_a_damaged_old_file_is_read_or_refused(tmp_path_factory: Any, where: int, value: int, cut: int) -> None:
    data = bytearray(legacy({f"blk.{i}.attn_q.weight": (2, [1.0, 2.0, 3.0]) for i in range(4)}))
    data[where % len(data)] = value
    file = tmp_path_factory.getbasetemp() / "damaged.dat"
    file.write_bytes(bytes(data[: len(data) - cut]))
    with contextlib.suppress(ModelFileError):
        assert all(np.isfinite(columns).all() for columns in read_imatrix(file).values())
