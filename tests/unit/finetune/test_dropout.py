"""Dropout of embeddings and residuals, and random draws that depend on their key alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from koala_local.finetune.dropout import random_state, seed_of
from koala_local.finetune.model import Trainee
from koala_local.finetune.settings import LoraSettings, Settings

from .tiny import SETTINGS, batch, distance, gradients, loss_of, trainee

PACKED = batch([[20, 30, 13], [40]])
DROPPING = replace(SETTINGS, dropout=0.2)


def test_draws_are_a_function_of_the_key() -> None:
    def draw(*key: int) -> torch.Tensor:
        with random_state(*key):
            return torch.rand(4)

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn = draw(42, 3, 1)
    assert torch.equal(torch.rand(3), expected)  # whoever draws outside is not disturbed
    assert torch.equal(drawn, draw(42, 3, 1))
    keys = [(42, 3, 1), (42, 3, 2), (42, 31), (4, 23, 1), (42, 1, 3)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(42, "model.norm.weight") == 16343159041089047419


def test_embeddings_and_residuals_are_dropped_in_training_alone() -> None:
    model, plain = trainee(DROPPING), trainee()
    with random_state(1):
        dropped = loss_of(model, PACKED).item()
    with random_state(2):
        assert loss_of(model, PACKED).item() != dropped
    assert loss_of(model.eval(), PACKED).item() == loss_of(plain, PACKED).item()


def test_which_values_are_dropped() -> None:
    model = trainee(replace(SETTINGS, dropout=0.5))
    seen: dict[str, torch.Tensor] = {}

    def look(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    backbone = model.model.model
    for name, module in (("embedding", backbone.embed_tokens), ("attention", backbone.layers[1].self_attn)):
        module.register_forward_hook(look(name))
    backbone.layers[0].mlp.register_forward_hook(look("feed forward"))
    with random_state(3):
        loss_of(model, batch([[64]] * 4))
    shares = {name: float((values == 0).float().mean()) for name, values in seen.items()}
    assert shares == {name: pytest.approx(0.5, abs=0.03) for name in ("embedding", "attention", "feed forward")}


SETS = {
    "residual": DROPPING,
    "residual and attention": replace(DROPPING, attention_dropout=0.3),
    "adapters": replace(DROPPING, lora=LoraSettings(rank=4, dropout=0.3)),
}


def drawn(settings: Settings, key: int) -> tuple[float, dict[str, torch.Tensor]]:
    model: Trainee = trainee(settings)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.01)
    with random_state(key):
        return gradients(model, PACKED)


@pytest.mark.parametrize("settings", SETS.values(), ids=SETS.keys())
def test_recomputation_draws_the_same(settings: Settings) -> None:
    loss, found = drawn(settings, 5)
    assert drawn(settings, 6)[0] != loss
    for mode in ("selective", "full"):
        again, others = drawn(replace(settings, recompute=mode), 5)
        assert again == loss
        assert distance(found, others) < 1e-6
