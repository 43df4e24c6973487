"""What `test_sharding` looks at, computed without ranks, by one, and by two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.dropout import random_state
from koala_local.finetune.model import Trainee, base_config, build, inputs_of, shape_config
from koala_local.finetune.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from koala_local.finetune.settings import LoraSettings, Settings
from koala_local.finetune.sharding import plain_name
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from .tiny import CPU, SETTINGS, SHAPE, VOCABULARY, batch

STEPS = 3
ON_ONE_RANK = ("single", "sixteen")  # of a mesh of one
QUICK = replace(SETTINGS, learning_rate=1e-2, warmup_steps=2)
LORA = LoraSettings(rank=4, dropout=0.1)
TRAINED: dict[str, Settings] = {
    "double": replace(QUICK, master_dtype="float64"),
    "single": QUICK,
    "tied": replace(QUICK, model=replace(SHAPE, tied_embeddings=True)),
    "dropped and recomputed": replace(QUICK, dropout=0.1, recompute="selective"),
    "sixteen": replace(QUICK, compute_dtype="bfloat16", recompute="full"),
    "lora": replace(QUICK, lora=LORA, learning_rate=3e-2),
    "qlora": replace(QUICK, lora=replace(LORA, four_bit=True), learning_rate=3e-2),
}


def rows() -> list[Batch]:
    """The four rows of a step, one of them empty: in a micro-batch each."""
    documents: list[list[int]] = [[20, 30], [64], [], [5] * 9]
    return [batch([inside], seed=row) for row, inside in enumerate(documents)]


def train(settings: Settings, mesh: DeviceMesh | None) -> tuple[Trainee, list[tuple[float, float]]]:
    """The model after some steps, and each step's loss and gradient norm."""
    assert settings.model
    model = build(shape_config(settings.model, VOCABULARY), None, settings, device=CPU, mesh=mesh)
    optimizer, found = build_optimizer(model, settings), []
    rank, ranks = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    for step in range(STEPS):
        whole = float(sum(np.sum(each.weights, dtype=np.float64) for each in rows()))
        total = torch.zeros((), dtype=torch.float64)
        for row, each in list(enumerate(rows()))[rank::ranks]:
            with random_state(settings.seed, step, row):
                loss = model(inputs_of(each, CPU)) / whole
                loss.backward()
            total += loss.detach()
        if mesh:
            dist.all_reduce(total, group=mesh.get_group())
        norm = clip_gradients(model.parameters(), settings.clip)
        set_learning_rate(optimizer, learning_rate(step, STEPS, settings))
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(total), float(norm)))
    return model, found


def weights(model: Trainee) -> Iterator[tuple[str, Any]]:
    """Whole, by their names in a checkpoint; on every rank."""
    for name, each in model.model.named_parameters():
        if each.is_floating_point():
            yield plain_name(name), each.full_tensor() if isinstance(each, DTensor) else each.detach()


def loaded(base: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    settings = replace(SETTINGS, model=None)
    model = build(base_config(base, 64), base, settings, device=CPU, mesh=mesh)
    inputs = inputs_of(batch([[40]], length=40), CPU)
    held = sum(each.to_local().numel() if isinstance(each, DTensor) else each.numel() for each in model.parameters())
    logits = model(inputs, logits_at=torch.arange(40)).detach()
    return {"logits": logits, "held": held, "weights": dict(weights(model))}


def results(base: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    found: dict[str, Any] = {"loaded": loaded(base, mesh)}
    for name, settings in TRAINED.items():
        if name in ON_ONE_RANK if mesh and mesh.size() == 1 else mesh or name != "sixteen":  # two types take a mesh
            model, curve = train(settings, mesh)
            types = {each.dtype for each in model.parameters() if each.requires_grad}
            found[name] = {"curve": curve, "weights": dict(weights(model)), "types": types}
    return found


def of_ranks(folder: Path, base: Path) -> None:
    """To be run by both of two ranks: as two, and then each as a mesh of one."""
    number = dist.get_rank()
    torch.save(results(base, init_device_mesh("cpu", (2,))), folder / f"2-{number}.pt")
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ranks", "alone"))["alone"]
    found = results(base, alone)
    if number == 0:
        torch.save(found, folder / "1-0.pt")
