"""What a pass of the layer-streamed forward takes, to be said before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from koala_local.models.configuration import ModelConfig
from koala_local.wording import duration, size

from .forward import LOGITS_BYTES, STATES_BYTES, Compute

_PROGRAM = 400 << 20  # bytes that torch and the rest take
_SOLVING = 7  # copies of the largest Hessian and of its matrix while GPTQ works on them (measured)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a pass over a sample will take. `memory` is the peak in bytes, `disk` what states spill to a file."""

    tokens: int
    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        spilled = f", {size(self.disk)} of temporary file" if self.disk else ""
        return (
            f"{self.tokens:,} tokens, about {duration(self.seconds)}, "
            f"at most about {size(self.memory)} of memory{spilled}"
        )


def estimate(
    config: ModelConfig,
    tokens: int,
    sequence: int,
    *,
    head: bool = True,
    gptq: bool = False,
    compute: Compute | None = None,
) -> Estimate:
    """What a pass of `tokens` tokens in sequences of `sequence` takes here, from a short measurement of matrix
    products; with `gptq` that which collects Hessians, and the memory to solve them. Reading the weights is not
    counted: a slow disk adds its own time."""
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    attention = hidden * config.head_size * (config.heads + config.kv_heads) * 2
    layer = attention + 3 * hidden * feed_forward
    # The outer products of each group's inputs, and gate and up once more.
    hessians = (3 * hidden**2 + feed_forward**2 + 2 * hidden * feed_forward) * gptq
    vocabulary = config.vocabulary_size * hidden
    scores = 2 * min(sequence, tokens) * config.heads * config.head_size  # q k and p v, each half because causal
    work = 2 * tokens * (config.layers * (layer + hessians) + vocabulary * head) + tokens * scores * config.layers
    states = 4 * tokens * hidden
    wide = 4 * sequence * (3 * feed_forward + 6 * hidden)
    logits = min(LOGITS_BYTES, 4 * tokens * config.vocabulary_size)
    kept = 0 if states > STATES_BYTES else states
    read = 2 * hidden * feed_forward  # one matrix as it was stored
    solving = _SOLVING * 4 * feed_forward * (feed_forward + hidden) * gptq
    copies = 2 if gptq else 1  # of the states
    peak = _PROGRAM + kept * copies + max(4 * layer + max(read + wide, solving), (2 * vocabulary + logits) * head)
    return Estimate(tokens, work / _flops_per_second(compute or Compute()), peak, (states - kept) * copies)


def _flops_per_second(compute: Compute) -> float:
    side = 1024 if compute.device == "cpu" else 4096
    x = torch.ones(256, side, device=compute.device, dtype=compute.dtype)
    w = torch.ones(side, side, device=compute.device, dtype=compute.dtype)
    functional.linear(x, w).sum().item()
    start = time.perf_counter()
    sum(functional.linear(x, w) for _ in range(4)).sum().item()  # type: ignore[union-attr]
    return 4 * 2 * 256 * side * side / (time.perf_counter() - start)
