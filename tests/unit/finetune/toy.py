"""A tiny run in memory: a corpus that can be learned, packed by hand, and a LLaMA of two layers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from koala_local.finetune.checkpoint import Checkpoints
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.launch import Rank
from koala_local.finetune.model import build, shape_config
from koala_local.finetune.optimizer import build_optimizer
from koala_local.finetune.settings import ModelShape, Settings
from koala_local.finetune.train import Run, Step
from numpy.typing import NDArray
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

VOCABULARY, LENGTH = 64, 32
SHAPE = ModelShape(hidden_size=32, feed_forward_size=64, layers=2, heads=4, kv_heads=2, context=LENGTH)
SETTINGS = Settings(
    max_steps=50, sequence_length=LENGTH, global_batch=4, micro_batch=1, learning_rate=3e-3, warmup_steps=5,
    dropout=0.0, save_every=5, keep=2, recompute="none", model=SHAPE,
)  # fmt: skip


@dataclass(frozen=True)
class ToyPlan:
    """Rows of documents of 5 to 12 tokens that count up in steps of 1 to 3; the second half of each is trained."""

    rows: int = 256
    key: str = "toy"

    def step_rows(self, step: int, global_batch: int) -> NDArray[np.int64]:
        epoch, start = divmod(step * global_batch, self.rows)
        order = np.random.default_rng(epoch).permutation(self.rows)
        return order[start : start + global_batch]

    def batch(self, rows: NDArray[np.int64], loss_norm: Any = "token") -> Batch:
        made = [_row(int(row)) for row in rows]
        ids, targets, weights, positions, documents = (np.stack(part) for part in zip(*made, strict=True))
        return Batch(ids, targets, weights, positions, documents)


def _row(number: int) -> tuple[NDArray[Any], ...]:
    dice = np.random.default_rng(number)
    ids, targets, positions = (np.zeros(LENGTH, dtype=np.int64) for _ in range(3))
    weights, documents = np.zeros(LENGTH, dtype=np.float32), np.full(LENGTH, -1, dtype=np.int32)
    start = document = 0
    while LENGTH - start >= 5:
        size = min(int(dice.integers(5, 13)), LENGTH - start)
        text = (dice.integers(VOCABULARY) + dice.integers(1, 4) * np.arange(size + 1)) % VOCABULARY
        place = slice(start, start + size)
        ids[place], targets[place] = text[:-1], text[1:]
        positions[place], documents[place] = np.arange(size), document
        weights[start + size // 2 : start + size] = 1
        start, document = start + size, document + 1
    targets[weights == 0] = 0
    return ids, targets, weights, positions, documents


def make_run(folder: Path, settings: Settings = SETTINGS, **changes: Any) -> tuple[Run, list[Step]]:
    """A run on this process, or on all ranks of the process group, and the list its steps go to."""
    torch.set_num_threads(1)
    here = dist.is_initialized()
    rank = Rank(dist.get_rank(), dist.get_world_size(), dist.get_rank()) if here else Rank()
    mesh = init_device_mesh("cpu", (rank.world_size,)) if rank.world_size > 1 else None
    trainee = build(
        shape_config(settings.model or SHAPE, VOCABULARY), None, settings, device=torch.device("cpu"), mesh=mesh
    )
    steps: list[Step] = []
    run = Run(
        trainee=trainee,
        optimizer=build_optimizer(trainee, settings),
        plan=ToyPlan(),
        settings=settings,
        total_steps=settings.max_steps or 50,
        rank=rank,
        device=torch.device("cpu"),
        checkpoints=Checkpoints(folder, settings.keep),
        tell=steps.append,
        evaluate=lambda _: None,
    )
    for name, value in changes.items():
        setattr(run, name, value)
    return run, steps


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.trainee.named_parameters()}


class TwoRanks:
    """Two processes with a process group. What they import is imported once, whatever they are then asked to do."""

    def __init__(self, meeting: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.finetune_preload"])
        self._pipes, self._ranks = [], []
        for number in range(2):
            here, there = context.Pipe()
            self._pipes.append(here)
            self._ranks.append(context.Process(target=_serve, args=(number, meeting, there), daemon=True))
            self._ranks[-1].start()

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(*arguments)` returns on each of them."""
        for pipe in self._pipes:
            pipe.send((work, arguments))
        assert all(pipe.poll(120) for pipe in self._pipes), "a rank does not answer"
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        for pipe, rank in zip(self._pipes, self._ranks, strict=True):
            pipe.close()
            rank.join(10)
            rank.kill()


def _serve(rank: int, meeting: Path, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(str(meeting), 2), rank=rank, world_size=2)
    with suppress(EOFError):
        while True:
            work, arguments = pipe.recv()
            pipe.send(work(*arguments))


def changed(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, **changes)
