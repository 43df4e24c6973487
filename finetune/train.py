"""The training loop. A step's batch is a function of (plan, step), its random draws of (seed, step, row): whatever the
number of ranks, and wherever the run was resumed, a step is the same up to the order of additions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from koala_local.errors import KoalaError
from koala_local.models.devices import peak_memory

from .checkpoint import Checkpoints, Saved, load
from .data.packing import Batch
from .dropout import random_state
from .launch import Rank
from .model import Trainee, inputs_of
from .optimizer import clip_gradients, learning_rate, set_learning_rate
from .settings import Settings, as_tree

_WINDOW, _ENOUGH = 50, 10  # steps whose mean loss a spike is measured from


class TrainingError(KoalaError):
    """A step whose loss or gradient is not usable. The checkpoint before it is kept."""


class Plan(Protocol):
    """The part of packing.PackPlan that the loop needs."""

    @property
    def key(self) -> str: ...

    def step_rows(self, step: int, global_batch: int) -> NDArray[np.int64]: ...

    def batch(self, rows: NDArray[np.int64], loss_norm: Any = "token") -> Batch: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What one step came to: a line of log.jsonl. `step` counts from 1; tokens are those of all ranks that are no
    padding."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    mfu: float | None  # None where the device's peak is not known
    memory_gb: float  # the most so far on rank 0: of the GPU, or of the process


@dataclass(slots=True)
class Run:
    """A run in memory. `done` and `losses` are all of its state that is not in the model and the optimizer."""

    trainee: Trainee
    optimizer: torch.optim.Optimizer
    plan: Plan
    settings: Settings
    total_steps: int
    rank: Rank
    device: torch.device
    checkpoints: Checkpoints
    tell: Callable[[Step], None]  # called on every rank
    evaluate: Callable[[int], None]  # called on every rank with the steps done
    stops: Callable[[], Sequence[int]] = tuple  # signals received so far
    mfu: Callable[[float], float | None] = lambda _: None  # of tokens a second
    base: str = ""  # of a frozen base, what tells it from others
    name_rows: Callable[[NDArray[np.int64]], str] = str  # where rows of the plan come from, for a person
    done: int = 0
    losses: list[float] = field(default_factory=list)  # of the last steps


def train(run: Run) -> int:
    """Train until the last step, or the first signal. Returns the signal's number, or 0. Everything is saved then.
    Raises TrainingError for a loss that is no number or a spike, CheckpointError when no checkpoint can be written."""
    run.trainee.train()
    while run.done < run.total_steps:
        begun = time.perf_counter()
        micro_batches = rows_of_rank(run)
        batches = [_batch(run, rows) for _, rows in micro_batches]
        weight, tokens, stop = _count(run, batches)
        if stop:
            break
        sums = [_backward(run, first, batch, weight) for (first, _), batch in zip(micro_batches, batches, strict=True)]
        loss = _over_ranks([float(torch.stack(sums).sum())])[0] / max(weight, 1e-30)
        norm = float(clip_gradients(run.trainee.parameters(), run.settings.clip))
        _check(run, loss, norm, [rows for _, rows in micro_batches], sums)
        rate = learning_rate(run.done, run.total_steps, run.settings)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.done += 1
        run.losses = [*run.losses, loss][-_WINDOW:]
        speed = tokens / (time.perf_counter() - begun)
        run.tell(Step(run.done, loss, rate, norm, tokens, speed, run.mfu(speed), _memory_gb(run.device)))
        run.checkpoints.check()
        if run.done % run.settings.save_every == 0:
            save(run)
        if _is_due(run.done, run.settings.eval_every) or run.done == run.total_steps:
            run.evaluate(run.done)
            run.trainee.train()
    else:
        stop = 0
    save(run)
    run.checkpoints.wait()
    return stop


def rows_of_rank(run: Run) -> list[tuple[int, NDArray[np.int64]]]:
    """This rank's micro-batches of the next step: the place of each one's first row in the global batch, and its rows.
    Every rank gets as many; those beyond the batch have no rows."""
    settings, rank = run.settings, run.rank
    rows = run.plan.step_rows(run.done, settings.global_batch)
    starts = range(0, len(rows), settings.micro_batch)
    each = -(-len(starts) // rank.world_size)
    mine = [(turn * rank.world_size + rank.number) * settings.micro_batch for turn in range(each)]
    return [(start, rows[start : start + settings.micro_batch]) for start in mine]


def _batch(run: Run, rows: NDArray[np.int64]) -> Batch:
    """The rows; without rows, one of the step's with no target in it: every rank has to take part in every pass."""
    if len(rows):
        return run.plan.batch(rows, run.settings.loss_norm)
    some = run.plan.step_rows(run.done, run.settings.global_batch)[:1]
    return run.plan.batch(some, run.settings.loss_norm).without_targets()


def _count(run: Run, batches: Sequence[Batch]) -> tuple[float, int, int]:
    """Over all ranks: the weight of the step's targets, its tokens, and the signal that one received, or 0."""
    weight = float(sum(batch.weights.sum(dtype=np.float64) for batch in batches))
    tokens = sum(batch.tokens for batch in batches)
    received = run.stops()
    weight, total, first = _over_ranks([weight, tokens], maxima=[received[0] if received else 0])
    return weight, int(total), int(first)


def _backward(run: Run, first: int, batch: Batch, weight: float) -> torch.Tensor:
    """Add the micro-batch's share to the gradients; its summed loss. `first` is its place in the global batch."""
    with random_state(run.settings.seed, run.done, first, device=run.device):
        loss: torch.Tensor = run.trainee(inputs_of(batch, run.device))
        (loss / max(weight, 1e-30)).backward()  # type: ignore[no-untyped-call]
    return loss.detach().double()


def _check(run: Run, loss: float, norm: float, rows: Sequence[NDArray[np.int64]], sums: Sequence[torch.Tensor]) -> None:
    """Raise TrainingError, on every rank, when the loss or the gradient is no finite number, or the loss a spike: over
    `spike_limit` nats and three standard deviations above the mean of the last 50 steps; before there are 10, twice the
    limit above the highest. Steps of few rows differ as their sources do, by nats; that is no spike."""
    usual, limit, which = _usual(run.losses, run.settings.spike_limit)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite and (not run.settings.spike_limit or loss <= usual + limit):
        return
    run.checkpoints.wait()
    worst = max(range(len(sums)), key=lambda number: _badness(sums[number]), default=0)
    mine = (_badness(sums[worst]), run.rank.number, rows[worst]) if sums else (-math.inf, run.rank.number, rows)
    everyone: list[Any] = [None] * run.rank.world_size
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    else:
        everyone = [mine]
    guilty = max(everyone, key=lambda each: each[:2])[2]
    what = f"a gradient norm of {norm}" if math.isfinite(loss) else f"a loss of {loss}"
    hint = "look at these rows, and at the base if it is the first step; a lower learning_rate may help"
    if finite:
        what = f"a loss of {loss:.3f}, {loss - usual:.1f} over the {which} of the steps before"
        hint += ", and spike_limit=0 lets a spike pass with --resume"
    raise TrainingError(f"step {run.done + 1} has {what}, most in {run.name_rows(guilty)}", hint)


def _usual(losses: Sequence[float], limit: float) -> tuple[float, float, str]:
    """What a loss is measured against, how far above that is a spike, and what it is called."""
    if len(losses) < _ENOUGH:
        return max(losses, default=math.inf), 2 * limit, "highest"
    return statistics.fmean(losses), limit + 3 * statistics.pstdev(losses), "mean"


def _badness(loss: torch.Tensor) -> float:
    value = float(loss)
    return value if math.isfinite(value) else math.inf


def _over_ranks(sums: Sequence[float], maxima: Sequence[float] = ()) -> list[float]:
    """The sums, and behind them the maxima, over all ranks, in float64."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [*sums, *maxima]
    result: list[float] = []
    for values, how in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        if values:
            tensor = torch.tensor(values, dtype=torch.float64)  # gloo is there for the processor, whatever else is
            dist.all_reduce(tensor, op=how)
            result += tensor.tolist()
    return result


def state_of(run: Run) -> dict[str, Any]:
    """The model's and the optimizer's state as torch's distributed checkpoint takes it, without frozen weights."""
    model, optimizer = get_state_dict(run.trainee, run.optimizer, options=_options(run))
    return {"model": model, "optimizer": optimizer}


def save(run: Run) -> None:
    """Write a checkpoint, in the background but for states of 8 bits."""
    about = {"plan": run.plan.key, "base": run.base, "settings": as_tree(run.settings), "losses": run.losses}
    at_once = run.settings.optimizer == "adamw8bit"
    run.checkpoints.save(run.done, state_of(run), {**about, "total_steps": run.total_steps}, at_once=at_once)


def restore(run: Run, saved: Saved) -> None:
    """Go on from a checkpoint. Raises CheckpointError."""
    state = state_of(run)
    load(saved, state)
    set_state_dict(
        run.trainee,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(run),
    )
    run.checkpoints.newest = saved.step
    run.done, run.losses = saved.step, [float(loss) for loss in saved.about["losses"]]


def _options(run: Run) -> StateDictOptions:
    partly = run.settings.lora is not None
    return StateDictOptions(ignore_frozen_params=partly, strict=not partly)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_memory() / 1e9
