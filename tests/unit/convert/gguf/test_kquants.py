"""Types and bytes against the installed library's own quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from koala_local.convert.gguf import kquants
from koala_local.convert.gguf.kquants import BASE_TYPES, parse_overrides, quantize_rows, tensor_types
from koala_local.convert.kernels import ggml

from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.configuration import ModelConfig
from tests.unit.convert.llama_quantize import llama_quantize, read_tensors, read_types

QUANTIZED = [kind for kind, base in BASE_TYPES.items() if base not in kquants.PLAIN_TYPES]
LLAMA_65B = (80, 8, 8, 256, False)  # as many layers as Llama-2-70B, whose mixes are its own
# layers, heads, KV heads, columns, tied: the mixes look at eighths of the layers, at the GQA ratio and at 80 layers
SHAPES = [
    (1, 4, 4, 256, False),
    (10, 4, 4, 256, True),
    (16, 4, 1, 256, False),
    (17, 4, 2, 256, True),
    (33, 8, 2, 256, False),
    (80, 8, 1, 256, False),
    LLAMA_65B,
    (8, 4, 4, 288, False),
    (8, 4, 4, 288, True),
]


def config(layers: int, heads: int, kv_heads: int, hidden: int, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        "LlamaForCausalLM", 8, hidden, hidden, layers, heads, kv_heads, hidden // heads, 1e-6, 1e4, 64, tied
    )  # fmt: skip


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model in few rows: what a mix sees are names and columns."""
    columns, kv = model.hidden_size, model.kv_heads * model.head_size
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (8, columns), "output_norm.weight": (columns,)}
    if not model.tied_embeddings:
        shapes["output.weight"] = (8, columns)
    for layer in range(model.layers):
        block = f"blk.{layer}."
        shapes |= {f"{block}{part}_norm.weight": (columns,) for part in ("attn", "ffn")}
        shapes |= {f"{block}attn_{part}.weight": (kv, columns) for part in "kv"}
        shapes |= {f"{block}attn_{part}.weight": (columns, columns) for part in ("q", "output")}
        shapes |= {f"{block}ffn_{part}.weight": (columns, columns) for part in ("gate", "up", "down")}
    return shapes


def write_zeros(path: Path, model: ModelConfig) -> Path:
    """An F32 GGUF of such a model. Zeros pack at once, and the types are the same as those of any weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.feed_forward_size)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(8)
    zeros: dict[tuple[int, ...], Any] = {}
    for name, shape in shapes_of(model).items():
        few = (min(shape[0], 2), *shape[1:]) if len(shape) > 1 else shape
        writer.add_tensor(name, zeros.setdefault(few, np.zeros(few, np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mix_is_llama_cpps(tmp_path: Path, shape: tuple[int, int, int, int, bool]) -> None:
    model = config(*shape)
    source = write_zeros(tmp_path / "source.gguf", model)
    vectors = {"blk.0.attn_q.weight": np.ones(model.hidden_size, np.float32)}
    for kind in QUANTIZED if shape != LLAMA_65B else ("Q4_K_M", "Q3_K_S"):
        for importance in (None, vectors) if kind in ("Q4_0", "IQ4_XS", "Q4_K_M") else (None,):
            expected = read_types(llama_quantize(source, tmp_path / "out.gguf", kind, importance=importance))
            types = tensor_types(kind, model, shapes_of(model), importance=importance is not None)
            assert types == expected, (kind, importance is not None)


def test_overrides_are_llama_cpps(tmp_path: Path) -> None:
    """Including that an overridden tensor does not count as a layer for those after it."""
    model = config(10, 4, 4, 256)
    source = write_zeros(tmp_path / "source.gguf", model)
    overrides = parse_overrides([r"blk\.(0|3)\.ffn_down=q3_k", "attn_v=Q8_0", "^token_embd=F16", r"blk\.5\.=BF16"])
    expected = read_types(llama_quantize(source, tmp_path / "out.gguf", "Q4_K_M", overrides=overrides))
    types = tensor_types("Q4_K_M", model, shapes_of(model), overrides)
    assert types == expected
    assert types["blk.5.attn_v.weight"] == "Q8_0"
    assert types["blk.5.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("specification", ["ffn_down", "ffn_down=Q9", "=Q4_K", "(=Q4_K", ""])
def test_bad_overrides_are_refused(specification: str) -> None:
    with pytest.raises(KoalaError):
        parse_overrides([specification])


def test_an_override_that_decides_nothing_is_refused() -> None:
    model = config(1, 4, 4, 256)
    with pytest.raises(KoalaError, match="ffn_dwon"):
        tensor_types("Q4_K_M", model, shapes_of(model), [("ffn_dwon", "Q8_0")])


def test_columns_that_fit_no_block_become_f16() -> None:
    model = config(1, 2, 2, 80)
    assert tensor_types("Q4_K_M", model, shapes_of(model))["blk.0.ffn_up.weight"] == "F16"
    assert tensor_types("Q8_0", model, shapes_of(model))["blk.0.ffn_up.weight"] == "F16"


def test_bits_name_a_mix() -> None:
    assert [kquants.kind_for_bits(bits) for bits in (2, 4, 8)] == ["Q2_K", "Q4_K_M", "Q8_0"]
    with pytest.raises(KoalaError, match="7 bits"):
        kquants.kind_for_bits(7)


# the kernel

TYPES = [name for name in kquants.TENSOR_TYPES if name not in kquants.PLAIN_TYPES]


def weights(rows: int = 3, columns: int = 512, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


@pytest.mark.parametrize("type_", TYPES)
def test_packed_rows_come_back_near(type_: str) -> None:
    rows = weights()
    packed = quantize_rows(rows, type_)
    assert packed.nbytes == 3 * ggml.row_size(type_, 512)
    back = gguf.quants.dequantize(packed.reshape(3, -1), gguf.GGMLQuantizationType[type_])
    assert np.sqrt(np.mean((back - rows) ** 2)) < 2.0 ** (1 - int(type_.lstrip("IQ")[0])) + 0.02


@pytest.mark.parametrize("type_", [*TYPES, *kquants.PLAIN_TYPES])
def test_a_row_depends_on_itself_alone(type_: str) -> None:
    rows, importance = weights(), np.abs(weights(1)[0]) + 0.01
    whole = quantize_rows(rows, type_, importance)
    parts = [quantize_rows(rows[i : i + 1], type_, importance) for i in range(3)]
    assert whole.tobytes() == b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize("type_", ["F16", "BF16"])
def test_sixteen_bits_round_as_ggml_does(tmp_path: Path, type_: str) -> None:
    """Ties, denormals, signed zeros, and the largest numbers."""
    bits = np.random.default_rng(1).integers(0, 2**32, 64 * 256, dtype=np.uint32)
    rows = bits.view(np.float32).copy()
    rows[:64] = np.float32(1) + np.arange(64, dtype=np.float32) * np.float32(
        2**-9
    )  # every other one is a tie in bfloat16
    rows[64:66] = 0.0, -0.0
    limit = 6.5e4 if type_ == "F16" else 3.38e38
    rows = np.where(np.abs(rows) < limit, rows, np.float32(1e-5)).reshape(64, 256)
    model = config(1, 4, 4, 256)
    writer_input = write_zeros(tmp_path / "source.gguf", model)
    content = bytearray(writer_input.read_bytes())
    tensor = next(item for item in gguf.GGUFReader(writer_input).tensors if item.name == "blk.0.ffn_up.weight")
    content[tensor.data_offset : tensor.data_offset + 2048] = rows[:2].tobytes()
    writer_input.write_bytes(content)
    expected = read_tensors(llama_quantize(writer_input, tmp_path / "out.gguf", type_))["blk.0.ffn_up.weight"]
    assert expected == (type_, quantize_rows(rows[:2], type_).tobytes())


@pytest.mark.parametrize("type_", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_weights_are_refused_by_name(type_: str, value: float) -> None:
    rows = weights()
    rows[1, 77] = value
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight"):
        quantize_rows(rows, type_, name="model.norm.weight")


def test_weights_beyond_a_types_range_are_refused() -> None:
    with pytest.raises(ModelFileError, match="65504"):
        quantize_rows(weights() * 1e5, "F16", name="w")
    with pytest.raises(ModelFileError, match="w cannot be packed"):
        quantize_rows(weights() * 1e10, "Q8_0", name="w")
    with pytest.raises(ModelFileError, match="BF16"):
        quantize_rows(np.full((1, 32), np.finfo(np.float32).max), "BF16", name="w")


@pytest.mark.parametrize("importance", [np.ones(3, np.float32), np.full(512, np.nan, np.float32)])
def test_an_importance_that_does_not_fit_is_refused(importance: Any) -> None:
    with pytest.raises(ModelFileError, match="importance matrix"):
        quantize_rows(weights(), "Q4_K", importance, name="w")
