"""How a LLaMA-family checkpoint lies in a GGUF: tensor names, shapes and types, and the metadata keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig

from ..sources.architecture import Checkpoint
from ..sources.gguf_names import gguf_name
from ..vocabulary.read import Vocabulary
from .kquants import tensor_types

_FILE_TYPES = {"F32": "ALL_F32"}  # the others are MOSTLY_<kind>


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output: GGUF name, Hugging Face name ("": computed, in `data`), shape (rows first), type, and the
    number of heads where rows are permuted (0: they stay)."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    heads: int = 0
    data: NDArray[np.float32] | None = None


def plan_tensors(
    source: Checkpoint, kind: str, overrides: Sequence[tuple[str, str]] = (), *, importance: bool = False
) -> list[PlannedTensor]:
    """Every tensor of the output in file order; that they are all there was checked when `source` was opened. Raises
    ModelFileError for a RoPE scaling that is not known; KoalaError as `tensor_types`."""
    config = source.config
    shapes = {gguf_name(name): info.shape for name, info in source.tensors.items()}
    types = tensor_types(kind, config, shapes, overrides, importance=importance)
    plan = [
        PlannedTensor(written, name, shape, types[written], _permuted_heads(name, config))
        for name, (written, shape) in zip(source.tensors, shapes.items(), strict=True)
    ]
    factors = rope_factors(config)
    if factors is not None:
        plan.insert(0, PlannedTensor("rope_freqs.weight", "", factors.shape, "F32", data=factors))
    return plan


def _permuted_heads(name: str, config: ModelConfig) -> int:
    if ".q_proj." in name:
        return config.heads
    return config.kv_heads if ".k_proj." in name else 0


def write_metadata(
    writer: gguf.GGUFWriter, config: ModelConfig, vocabulary: Vocabulary, kind: str, *, name: str
) -> None:
    """Add every key of a LLaMA model. Raises ModelFileError for a RoPE scaling that llama.cpp's LLaMA does not have."""
    writer.add_name(name)
    if config.licence:
        writer.add_license(config.licence)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(len(vocabulary.tokens))
    if config.head_size * config.heads != config.hidden_size:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    _write_rope_scaling(writer, config)
    _write_tokenizer(writer, vocabulary)


def _write_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    ids = (
        (vocabulary.bos, writer.add_bos_token_id),
        (vocabulary.eos, writer.add_eos_token_id),
        (vocabulary.unk, writer.add_unk_token_id),
        (vocabulary.pad, writer.add_pad_token_id),
    )
    for token, add in ids:
        if token is not None:
            add(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _rope_type(config: ModelConfig) -> str:
    return str(config.rope_scaling.get("rope_type") or config.rope_scaling.get("type") or "default").lower()


def _rope_number(config: ModelConfig, *keys: str, default: float | None = None) -> float:
    found: Any = next((config.rope_scaling[key] for key in keys if config.rope_scaling.get(key) is not None), default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not (math.isfinite(found) and found > 0):
        raise ModelFileError(f"the RoPE scaling has no usable {keys[0]!r}: {str(found)[:80]!r}", "mend config.json")
    return float(found)


def _write_rope_scaling(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    match _rope_type(config):
        case "default" | "none" | "dynamic" | "llama3":
            return  # llama3 is a tensor of its own: rope_factors
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(_rope_number(config, "factor"))
        case "yarn":
            _write_yarn(writer, config)
        case other:
            raise ModelFileError(
                f"RoPE scaling {other[:80]!r} is not known for LLaMA", "known: linear, llama3, yarn, dynamic"
            )


def _write_yarn(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(_rope_number(config, "factor"))
    original = _rope_number(config, "original_max_position_embeddings", default=config.context)
    writer.add_rope_scaling_orig_ctx_len(int(original))
    optional = (
        (("extrapolation_factor",), writer.add_rope_scaling_yarn_ext_factor),
        (("attention_factor", "attn_factor"), writer.add_rope_scaling_yarn_attn_factor),
        (("beta_fast",), writer.add_rope_scaling_yarn_beta_fast),
        (("beta_slow",), writer.add_rope_scaling_yarn_beta_slow),
    )
    for keys, add in optional:
        if any(config.rope_scaling.get(key) is not None for key in keys):
            add(_rope_number(config, *keys))


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Llama 3.1's divisor of every rotary frequency (head_size / 2), or None for models without that scaling."""
    if _rope_type(config) != "llama3":
        return None
    factor = _rope_number(config, "factor", default=8.0)
    low = _rope_number(config, "low_freq_factor", default=1.0)
    high = _rope_number(config, "high_freq_factor", default=4.0)
    original = _rope_number(config, "original_max_position_embeddings", default=8192)
    if high <= low:
        raise ModelFileError("the RoPE scaling's high_freq_factor is not above its low_freq_factor", "mend config.json")
    steps = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    wavelength = 2 * math.pi / (1.0 / config.rope_base**steps)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelength > original / low, torch.full_like(wavelength, factor), between)
    factors = torch.where(wavelength < original / high, torch.ones_like(wavelength), factors)
    array: NDArray[np.float32] = factors.numpy()
    return array


def rope_notes(config: ModelConfig) -> Iterator[str]:
    """What llama.cpp does otherwise than transformers with long texts."""
    if _rope_type(config) == "dynamic":
        yield f"dynamic RoPE scaling is not written: beyond {config.context} tokens the model is unscaled"
    if config.sliding_window and config.sliding_window < config.context:
        yield f"llama.cpp has no sliding window here: beyond {config.sliding_window} tokens results differ"
