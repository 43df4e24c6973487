"""What the model can do so far: perplexity on held-out dialogues, by source, and replies to fixed prompts.

Perplexity is exact: the sum of the losses of all trained tokens of all held-out dialogues, by the loss that is trained
with, over their count. Dropout is off and no random number is drawn: training goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from koala_local.dialogue import Dialogue, Turn

from .data.corpus import Corpus
from .data.packing import Batch, PackPlan, held_out_rows
from .data.tokens import DialogueTokenizer
from .launch import Rank
from .model import Trainee, inputs_of

PROMPTS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about eucalyptus trees.",
)
SAMPLE_TOKENS = 48


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Of one source: the sum over its trained tokens, in nats, and how many there are."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Infinity where the mean is too large for a number."""
        return math.exp(self.mean) if not self.mean > 700 else math.inf


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy reply. `finished`: the model ended it, not the limit."""

    prompt: str
    reply: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """By source, where it has anything held out; and the samples."""

    losses: Mapping[str, HeldOutLoss]
    samples: tuple[Sample, ...] = ()

    @property
    def overall(self) -> HeldOutLoss:
        each = self.losses.values()
        return HeldOutLoss(sum(loss.total for loss in each), sum(loss.tokens for loss in each))

    def values(self) -> dict[str, Any]:
        """As a line of the log has it: an infinite or missing perplexity is null."""
        named = {**self.losses, "all": self.overall} if self.losses else {}
        return {
            "perplexity": {name: _finite(loss.perplexity) for name, loss in named.items()},
            "held_out_tokens": {name: loss.tokens for name, loss in named.items()},
            "samples": [{"prompt": s.prompt, "reply": s.reply, "finished": s.finished} for s in self.samples],
        }


def held_out(corpus: Corpus, sequence_length: int) -> dict[str, PackPlan]:
    """The held-out rows of each source that has any."""
    plans = {name: held_out_rows(corpus, name, sequence_length) for name in corpus.source_names}
    return {name: plan for name, plan in plans.items() if plan.rows}


def evaluate(
    trainee: Trainee,
    plans: Mapping[str, PackPlan],
    *,
    micro_batch: int,
    rank: Rank,
    device: torch.device,
    tokenizer: DialogueTokenizer | None = None,
    prompts: Sequence[str] = PROMPTS,
    sample_tokens: int = SAMPLE_TOKENS,
) -> Evaluation:
    """Perplexities on `plans`, and, with a tokenizer, a reply to each prompt. All ranks must call this; each takes its
    share of the rows, and all return the same. The model is left as it was, in training mode or not."""
    with _evaluating(trainee):
        losses = {
            name: _loss(trainee, plan, micro_batch=micro_batch, rank=rank, device=device)
            for name, plan in plans.items()
        }
        samples = _samples(trainee, tokenizer, prompts, sample_tokens, device) if tokenizer and prompts else ()
    return Evaluation(losses, samples)


@contextmanager
def _evaluating(trainee: Trainee) -> Iterator[None]:
    training = trainee.training
    trainee.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trainee.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass the root stays whole, and its state cannot be saved
        trainee.train(training)


def _loss(trainee: Trainee, plan: PackPlan, *, micro_batch: int, rank: Rank, device: torch.device) -> HeldOutLoss:
    """Every rank makes as many passes: sharded models run together."""
    starts = range(0, plan.rows, micro_batch)
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for turn in range(-(-len(starts) // rank.world_size)):
        start = (turn * rank.world_size + rank.number) * micro_batch
        rows = range(start, min(start + micro_batch, plan.rows))
        batch = plan.batch(rows) if rows else plan.batch([0]).without_targets()
        total += trainee(inputs_of(batch, device)).double()
        tokens += int(np.count_nonzero(batch.weights))
    both = torch.stack([total, torch.tensor(float(tokens), dtype=torch.float64, device=device)])
    if rank.world_size > 1:
        dist.all_reduce(both)
    return HeldOutLoss(float(both[0]), int(both[1]))


def _samples(
    trainee: Trainee, tokenizer: DialogueTokenizer, prompts: Sequence[str], limit: int, device: torch.device
) -> tuple[Sample, ...]:
    """Greedy replies, all prompts in one batch. The prefix is computed again for each token, by the forward pass that
    is trained: it works for sharded and compiled models, and a few short replies do not take a cache."""
    rows = [list(tokenizer.encode(Dialogue((Turn(prompt),))).ids) for prompt in prompts]
    ends = [len(row) for row in rows]
    longest = trainee.config.max_position_embeddings
    for _ in range(min(limit, longest - max(ends))):
        going = [row[-1] != tokenizer.eos or len(row) == end for row, end in zip(rows, ends, strict=True)]
        if not any(going):
            break
        for row, token, goes in zip(rows, _next_tokens(trainee, rows, device), going, strict=True):
            row.extend([token] if goes else [])
    return tuple(_sample(tokenizer, *each) for each in zip(prompts, rows, ends, strict=True))


def _next_tokens(trainee: Trainee, rows: Sequence[Sequence[int]], device: torch.device) -> list[int]:
    width = -(-max(map(len, rows)) // 64) * 64  # few different shapes for compiled blocks
    shape = (len(rows), width)
    ids, documents = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)], documents[place, : len(row)] = row, 0
    positions = np.tile(np.arange(width), (len(rows), 1))
    batch = Batch(ids, np.zeros_like(ids), np.zeros(shape, dtype=np.float32), positions, documents)
    last = [place * width + len(row) - 1 for place, row in enumerate(rows)]
    chosen: Tensor = trainee(inputs_of(batch, device), torch.tensor(last, device=device)).argmax(dim=-1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(chosen, src=0)  # ranks that rounded a tie apart would part for good
    return [int(token) for token in chosen.tolist()]


def _sample(tokenizer: DialogueTokenizer, prompt: str, row: Sequence[int], end: int) -> Sample:
    finished = len(row) > end and row[-1] == tokenizer.eos
    pieces = b"".join(tokenizer.piece(token) if token < tokenizer.size else b"" for token in row[end:])
    return Sample(prompt, pieces.decode("utf-8", "replace").strip(), finished)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
