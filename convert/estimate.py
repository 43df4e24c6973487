"""What a pass of the layer-streamed forward takes, to be said before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from koala_local.models.configuration import ModelConfig

from .forward import LOGITS_BYTES, STATES_BYTES, Compute


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a pass over a sample will take. `memory` is the peak in bytes, `disk` what states spill to a file."""

    tokens: int
    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        spilled = f", {self.disk / 1e9:.1f} GB of temporary file" if self.disk else ""
        return (
            f"{self.tokens:,} tokens, about {_duration(self.seconds)}, "
            f"at most about {self.memory / 1e9:.1f} GB of memory{spilled}"
        )


def estimate(
    config: ModelConfig,
    tokens: int,
    sequence: int,
    *,
    passes: float = 1,
    head: bool = True,
    compute: Compute | None = None,
) -> Estimate:
    """What `passes` passes of `tokens` tokens in sequences of `sequence` take here, from a short measurement of matrix
    products. Reading the weights is not counted: a slow disk adds its own time."""
    attention = config.hidden_size * config.head_size * (config.heads + config.kv_heads) * 2
    layer = attention + 3 * config.hidden_size * config.feed_forward_size
    vocabulary = config.vocabulary_size * config.hidden_size
    scores = 2 * min(sequence, tokens) * config.heads * config.head_size  # q k and p v, each half because causal
    work = 2 * tokens * (config.layers * layer * passes + vocabulary * head) + tokens * scores * config.layers * passes
    states = 4 * tokens * config.hidden_size
    wide = 4 * sequence * (3 * config.feed_forward_size + 6 * config.hidden_size)
    logits = min(LOGITS_BYTES, 4 * tokens * config.vocabulary_size)
    kept = 0 if states > STATES_BYTES else states
    read = 2 * config.hidden_size * config.feed_forward_size  # one matrix as it was stored
    peak = kept + max(4 * layer + read + wide, (2 * vocabulary + logits) * head)
    return Estimate(tokens, work / _flops_per_second(compute or Compute()), peak, states - kept)


def _flops_per_second(compute: Compute) -> float:
    size = 1024 if compute.device == "cpu" else 4096
    x = torch.ones(256, size, device=compute.device, dtype=compute.dtype)
    w = torch.ones(size, size, device=compute.device, dtype=compute.dtype)
    functional.linear(x, w).sum().item()
    start = time.perf_counter()
    sum(functional.linear(x, w) for _ in range(4)).sum().item()  # type: ignore[union-attr]
    return 4 * 2 * 256 * size * size / (time.perf_counter() - start)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
