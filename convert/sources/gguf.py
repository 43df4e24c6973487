"""A GGUF file as a checkpoint: weights in 16 or 32 bits as they are, quantized ones dequantized block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig, Settings
from koala_local.models.gguf_header import GgufHeader, Tensor, read_header

from .gguf_names import IN_A_LAYER, WHOLE_MODEL
from .layout import FileCheckpoint, assembled
from .stored import BLOCK_BYTES, ITEM_BYTES, MappedFile, Stored, in_file, rotary_halves, row_blocks

_LAYER = re.compile(r"blk\.(\d{1,4})\.(.+)\.weight")
_IN_LAYER = {there: here for here, there in IN_A_LAYER.items()}
_OUTSIDE = {there: here for here, there in WHOLE_MODEL.items()}
_ROPE_FACTORS = "rope_freqs.weight"
_SHOWN = 100


def open_gguf_checkpoint(path: Path) -> FileCheckpoint:
    """The checkpoint in the file. Raises ModelFileError for a damaged one, or another architecture than llama."""
    header = read_header(path)
    _refuse_others(header)
    file = MappedFile(path)
    stored: dict[str, Stored] = {}
    for tensor in header.tensors:
        name = _renamed(tensor.name)
        if name in stored:
            raise ModelFileError(f"{file.name} holds {name[:_SHOWN]!r} twice", "get the file again")
        stored[name] = _stored(file, tensor)
    factors = stored.pop(_ROPE_FACTORS, None)
    config = _config(header, stored, factors)
    for name in stored:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            stored[name] = rotary_halves(stored[name], config.head_size)
    description = f"{str(path)!r} (GGUF, {header.file_size} bytes)"
    return assembled(config, stored, tokenizer_folder=None, description=description)


def _refuse_others(header: GgufHeader) -> None:
    where = repr(str(header.path))
    if header.architecture != "llama":
        what = f"{where}: the architecture {header.architecture[:_SHOWN]!r} is not supported"
        raise ModelFileError(what, "LLaMA and Mistral models, whose GGUF says llama, can be converted")
    if header.metadata.get("llama.expert_count", 0):
        raise ModelFileError(f"{where}: a mixture of experts is not supported", "this model cannot be converted")
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ModelFileError(f"{where} is one part of several", "join the parts with llama-gguf-split --merge")


def _renamed(name: str) -> str:
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _IN_LAYER:
        return f"model.layers.{int(layer[1])}.{_IN_LAYER[layer[2]]}.weight"
    return _OUTSIDE.get(name, name)


def _stored(file: MappedFile, tensor: Tensor) -> Stored:
    """The tensor with its rows first."""
    shape = tensor.shape[::-1]
    if tensor.type in ITEM_BYTES:
        return in_file(file, tensor.offset, shape, tensor.type)
    row_bytes = tensor.size // math.prod(shape[:-1])
    kind = GGMLQuantizationType[tensor.type]
    try:
        dequantize(np.zeros((1, row_bytes), np.uint8), kind)
    except NotImplementedError:
        what = f"{file.name}: {tensor.name} is of the type {tensor.type}, which cannot be dequantized"
        raise ModelFileError(what, "start from the model in 16 bits") from None

    def read(start: int, stop: int) -> torch.Tensor:
        out = np.empty((stop - start, shape[-1]), np.float32)
        for block in row_blocks(out.shape, limit=BLOCK_BYTES):  # dequantizing takes several times what it returns
            rows = block.stop - block.start
            raw = file.view(np.uint8, rows * row_bytes, tensor.offset + (start + block.start) * row_bytes)
            out[block] = dequantize(raw.reshape(rows, row_bytes), kind)
        return torch.from_numpy(out)

    return Stored(shape, "F32", read, file.name)


def _config(header: GgufHeader, stored: Mapping[str, Stored], factors: Stored | None) -> ModelConfig:
    prefix = "llama."
    known = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    settings = Settings(known, f"the header of {str(header.path)!r}")
    tokens = Settings(header.metadata, settings.where)
    heads, hidden = settings.count("attention.head_count"), settings.count("embedding_length")
    head_size = settings.count("attention.key_length", settings.count("rope.dimension_count", hidden // heads or 1))
    if head_size % 2 or settings.count("rope.dimension_count", head_size) != head_size:
        raise settings.fail("rope.dimension_count")
    if settings.count("attention.value_length", head_size) != head_size:
        raise settings.fail("attention.value_length")
    embedding = stored.get("model.embed_tokens.weight")
    base = settings.number("rope.freq_base", 10000.0)
    bos = tokens.ids("tokenizer.ggml.bos_token_id")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_size=embedding.shape[0] if embedding else settings.count("vocab_size"),
        hidden_size=hidden,
        feed_forward_size=settings.count("feed_forward_length"),
        layers=settings.count("block_count"),
        heads=heads,
        kv_heads=settings.count("attention.head_count_kv", heads),
        head_size=head_size,
        norm_epsilon=settings.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_base=base,
        context=settings.count("context_length"),
        tied_embeddings="lm_head.weight" not in stored,
        rope_scaling=_llama3(settings, factors, base, head_size) if factors else _scaling(settings),
        bos=bos[0] if bos else None,
        eos=tokens.ids("tokenizer.ggml.eos_token_id"),
        name=header.name,
        licence=header.licence or "",
    )


def _scaling(settings: Settings) -> dict[str, Any]:
    """The header's scaling in transformers' words; empty when there is none."""
    kind = settings.values.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise settings.fail("rope.scaling.type")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": settings.number("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        trained = settings.count("rope.scaling.original_context_length", settings.count("context_length"))
        scaling["original_max_position_embeddings"] = trained
    return scaling


def _llama3(settings: Settings, factors: Stored, base: float, head_size: int) -> dict[str, Any]:
    """LLaMA 3.1's scaling, of which a GGUF holds only the table that follows from it: taken back from the table, and
    refused when the table is another one."""
    table = factors.read(0, factors.shape[0]).double()
    factor = float(table.max()) if table.numel() else 1.0
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    plain = base ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    kept = ((8192 * plain / (2 * math.pi) - 1.0) / 3.0).clamp(0, 1)  # 1: turns fast, is not scaled
    follows = 1 / (kept + (1 - kept) / factor)
    if table.shape != follows.shape or not torch.allclose(table, follows, rtol=1e-4):
        what = f"{settings.where}: {_ROPE_FACTORS} is not LLaMA 3.1's table of rotary factors"
        raise ModelFileError(what, "this model cannot be converted from its GGUF: use its Hugging Face checkpoint")
    return {"rope_type": "llama3", **scaling}
