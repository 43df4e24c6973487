"""Models and batches small enough for a test, and what they are held against: transformers' own eager attention, one
document at a time, with torch's cross-entropy over whole logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.model import Trainee, build, inputs_of, shape_config
from koala_local.finetune.settings import ModelShape, Settings
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

CPU = torch.device("cpu")
VOCABULARY = 61
SHAPE = ModelShape(hidden_size=32, feed_forward_size=48, layers=2, heads=4, kv_heads=2, context=128)
SETTINGS = Settings(model=SHAPE, sequence_length=64, dropout=0.0, recompute="none")


def trainee(settings: Settings = SETTINGS, base: Path | None = None) -> Trainee:
    """A new model of `settings.model`, unsharded."""
    assert settings.model
    return build(shape_config(settings.model, VOCABULARY), base, settings, device=CPU, mesh=None)


def batch(lengths: list[list[int]], length: int = 64, seed: int = 0) -> Batch:
    """Documents of these lengths in each row, random tokens; about half of them trained, with weights of any size."""
    draw = np.random.default_rng(seed)
    shape = (len(lengths), length)
    ids, targets = draw.integers(1, VOCABULARY, shape), draw.integers(1, VOCABULARY, shape)
    documents, positions = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.int64)
    for row, inside in enumerate(lengths):
        used = sum(inside)
        documents[row, :used] = np.repeat(np.arange(len(inside)), inside)
        positions[row, :used] = np.concatenate([np.arange(each) for each in inside]) if inside else []
    weights = draw.uniform(0.5, 2.0, shape) * (draw.random(shape) < 0.5) * (documents >= 0)
    return Batch(ids * (documents >= 0), targets * (weights > 0), weights.astype(np.float32), positions, documents)


def alone(packed: Batch) -> list[Batch]:
    """Each document of the batch in a batch of its own."""
    singles = []
    for row, inside in enumerate(packed.documents):
        for document in range(inside.max() + 1):
            place = np.flatnonzero(inside == document)
            where = (slice(row, row + 1), place)
            first = np.zeros((1, len(place)), dtype=np.int32)
            tokens = packed.ids[where], packed.targets[where], packed.weights[where], packed.positions[where]
            singles.append(Batch(*tokens, first))
    return singles


def loss_of(model: Trainee, *batches: Batch) -> Tensor:
    losses = [model(inputs_of(each, CPU)) for each in batches]
    return torch.stack(losses).sum()


def gradients(model: Trainee, *batches: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient with respect to everything that is trained, under the names in a checkpoint."""
    from koala_local.finetune.sharding import plain_name

    model.zero_grad()
    loss = loss_of(model, *batches)
    loss.backward()
    found = {plain_name(name): each.grad for name, each in model.model.named_parameters() if each.grad is not None}
    return loss.item(), {name: gradient.clone() for name, gradient in found.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    whole = sum(float(one[name].double().square().sum()) for name in one)
    return float(np.sqrt(apart / whole))


def by_transformers(model: Trainee, *batches: Batch) -> tuple[float, dict[str, Tensor]]:
    """As `gradients`, by a copy of the model with eager attention, each document alone."""
    config = LlamaConfig.from_dict({**model.config.to_dict(), "attn_implementation": None})
    config._attn_implementation = "eager"
    other: Any = LlamaForCausalLM(config)
    other.to(next(model.parameters()).dtype)
    other.load_state_dict(model.model.state_dict())
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for each in (single for packed in batches for single in alone(packed)):
        logits = other(torch.from_numpy(each.ids), use_cache=False).logits
        losses = cross_entropy(logits[0], torch.from_numpy(each.targets[0]), reduction="none")
        total = total + (losses * torch.from_numpy(each.weights[0])).sum()
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in other.named_parameters()}


def checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "20KB", **changes: Any) -> Path:
    """A Hugging Face checkpoint of random weights, written by transformers in several files."""
    shape = replace(SHAPE, **changes)
    torch.manual_seed(1)
    config: Any = shape_config(shape, VOCABULARY)
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder
