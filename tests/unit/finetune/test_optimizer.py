"""AdamW's groups, the schedule, clipping and 8-bit states."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from koala_local.finetune.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from koala_local.finetune.settings import LoraSettings, Settings

from koala_local.errors import KoalaError

from .tiny import SETTINGS, SHAPE, batch, loss_of, trainee


def rates(total: int, **changes: float) -> list[float]:
    settings = replace(SETTINGS, learning_rate=1.0, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, total, settings) for step in range(total)]


def test_warm_up_then_cosine() -> None:
    found = rates(110, warmup_steps=10, min_learning_rate=0.1)
    assert found[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert found[59] == pytest.approx(0.55)  # half way
    assert found[109] == pytest.approx(0.1)
    falls = [now - then for now, then in pairwise(found[9:])]
    assert 0 < min(falls) < max(falls) < 0.9 * math.pi / 200 + 1e-3


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 100), (5, 5), (5, 100), (3, 0)])
def test_short_runs_have_a_rate_at_every_step(total: int, warmup: int) -> None:
    found = rates(total, warmup_steps=warmup, min_learning_rate=0.0)
    assert all(0.0 <= rate <= 1.0 for rate in found)
    assert max(found) == 1.0 if warmup >= total else found[-1] == pytest.approx(0.0, abs=1e-12)


def test_norms_do_not_decay() -> None:
    model = trainee()
    optimizer = build_optimizer(model, replace(SETTINGS, weight_decay=0.1, learning_rate=0.5, beta1=0.8, beta2=0.9))
    decay = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert {name: decay[id(each)] for name, each in model.model.named_parameters()} == {
        name: 0.0 if "norm" in name else 0.1 for name, _ in model.model.named_parameters()
    }
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.25)
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)


def test_adapters_alone_are_trained() -> None:
    model = trainee(replace(SETTINGS, lora=LoraSettings(rank=2)))
    optimizer = build_optimizer(model, SETTINGS)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert trained == {id(each) for name, each in model.named_parameters() if ".lora_" in name}


def test_clipping_gives_the_norm_before_it() -> None:
    model = trainee()
    (loss_of(model, batch([[60]])) * 100).backward()
    before = math.sqrt(sum(float(each.grad.square().sum()) for each in model.parameters() if each.grad is not None))
    assert float(clip_gradients(model.parameters(), 1.0)) == pytest.approx(before, rel=1e-5)
    assert float(clip_gradients(model.parameters(), 1.0)) == pytest.approx(1.0, rel=1e-4)


def trained(settings: Settings, steps: int = 12) -> tuple[list[float], torch.optim.Optimizer]:
    """The loss at each step on one batch, and the optimizer."""
    model = trainee(settings)
    optimizer, losses = build_optimizer(model, settings), []
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, steps, settings))
        loss = loss_of(model, batch([[60]]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def test_the_loss_falls() -> None:
    losses, _ = trained(replace(SETTINGS, learning_rate=1e-2, warmup_steps=2))
    assert losses[-1] < 0.6 * losses[0]


def test_eight_bit_states() -> None:
    pytest.importorskip("torchao.optim")
    wide = replace(SHAPE, hidden_size=64, feed_forward_size=128)  # small tensors keep 32 bits
    settings = replace(SETTINGS, model=wide, learning_rate=1e-2, warmup_steps=2)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        eight, optimizer = trained(replace(settings, optimizer="adamw8bit"))
    assert eight[-1] == pytest.approx(trained(settings)[0][-1], rel=0.05)
    kept = {type(state["exp_avg"]).__name__ for state in optimizer.state.values()}
    assert "OptimState8bit" in kept


def test_eight_bit_states_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(KoalaError, match="torchao, which is not installed"):
        build_optimizer(trainee(), replace(SETTINGS, optimizer="adamw8bit"))
