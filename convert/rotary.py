"""Rotary position tables for every scaling that LLaMA-family configurations name, as transformers computes them.

`rope_scaling` comes from an untrusted configuration: what is missing, no number or unknown raises ModelFileError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig


class Rope(NamedTuple):
    """Cosines and sines of each position, (tokens, head size), both halves of a head alike."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_table(config: ModelConfig, tokens: int, device: torch.device | str = "cpu") -> Rope:
    """The table for positions 0 to `tokens` - 1, in float32. Raises ModelFileError for a scaling that is not known."""
    frequencies, magnitude = _frequencies(config, tokens)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies).repeat(1, 2)  # (tokens, head)
    return Rope((angles.cos() * magnitude).to(device), (angles.sin() * magnitude).to(device))


def _frequencies(config: ModelConfig, tokens: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of a head, (head / 2), and the factor on cosines and sines."""
    scaling = config.rope_scaling
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default").lower()
    if kind in ("default", "none"):
        return _plain(config.rope_base, config.head_size), 1.0
    if kind == "linear":
        return _plain(config.rope_base, config.head_size) / _number(scaling, "factor"), 1.0
    if kind == "dynamic":
        return _dynamic(config, tokens), 1.0
    if kind == "llama3":
        return _llama3(config), 1.0
    if kind == "yarn":
        return _yarn(config)
    raise ModelFileError(f"RoPE scaling {kind[:80]!r} is not known for LLaMA", "known: linear, llama3, yarn, dynamic")


def _plain(base: float, size: int) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


def _dynamic(config: ModelConfig, tokens: int) -> torch.Tensor:
    """The base grows with a text longer than the context; up to there nothing changes."""
    factor, size = _number(config.rope_scaling, "factor"), config.head_size
    growth = factor * max(tokens, config.context) / config.context - (factor - 1)
    return _plain(config.rope_base * growth ** (size / (size - 2)), size)


def _llama3(config: ModelConfig) -> torch.Tensor:
    """Llama 3.1: slow rotations are divided by the factor, fast ones kept, those between blended."""
    scaling = config.rope_scaling
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = _number(scaling, "original_max_position_embeddings")
    plain = _plain(config.rope_base, config.head_size)
    turns = trained * plain / (2 * math.pi)  # how often a pair turns within the context it was trained on
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _yarn(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): as above, blended over the pairs between beta_fast and beta_slow turns."""
    scaling, size = config.rope_scaling, config.head_size
    factor = _number(scaling, "factor")
    trained = _number(scaling, "original_max_position_embeddings", config.context)

    def pair_of(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = pair_of(_number(scaling, "beta_fast", 32)), pair_of(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    slow = ((torch.arange(size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    plain = _plain(config.rope_base, size)
    return plain * (1 - slow) + plain / factor * slow, _yarn_magnitude(scaling, factor)


def _yarn_magnitude(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(_number(scaling, "mscale")) / magnitude(_number(scaling, "mscale_all_dim"))
    return magnitude(1.0)


def _number(scaling: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None or value == 0:
        value = default
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ModelFileError(f"the RoPE scaling has no usable {key!r}: {str(scaling.get(key))[:80]!r}", "mend config.json")
