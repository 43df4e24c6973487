"""Dropout where the published command has it and transformers' LLaMA has not: embeddings and residuals.

Every draw of a run is a function of (seed, step, row), so a resumed run draws what the uninterrupted one would have, at
any number of ranks. Activation recomputation restores the generators, so it redraws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout


@contextmanager
def random_state(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """torch's generators (the processor's and that of a CUDA `device`) seeded by `key`, restored at the end.

    For a micro-batch: `random_state(seed, step, row)` around its forward AND backward pass, `row` being the place of
    its first row in the global batch. The number of ranks is no part of the key: it may change between two runs."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed_of(*key))
        yield


def seed_of(*key: int | str) -> int:
    """64 bits that depend on every part of the key and on nothing else."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def add_dropout(model: nn.Module, probability: float) -> None:
    """Let `model` (LlamaForCausalLM, MistralForCausalLM) drop embeddings and what attention and feed-forward layers add
    to the residual stream, while training. To be called before blocks are wrapped; nothing for 0."""
    if probability == 0.0:
        return

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, Tensor):
            return dropout(output, probability)
        return (dropout(output[0], probability), *output[1:])

    backbone: Any = model.model
    backbone.embed_tokens.register_forward_hook(drop)
    for block in backbone.layers:
        block.self_attn.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)
