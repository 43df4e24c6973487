"""Sharded over one rank and over two, training is what it is without ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from koala_local.finetune.model import inputs_of
from koala_local.finetune.settings import LoraSettings, ModelShape, Settings
from koala_local.finetune.sharding import Recompute, plain_name
from torch.profiler import ProfilerActivity, profile

from .ranks import ON_ONE_RANK, TRAINED, of_ranks
from .ranks import results as of_mesh
from .tiny import CPU, SETTINGS, batch, checkpoint, trainee
from .toy import TwoRanks

Results = dict[str, Any]  # of no mesh ("0-0"), of a mesh of one ("1-0"), of both ranks of two ("2-0", "2-1")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, ranks: TwoRanks) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    base = checkpoint(folder / "base")
    ranks.run(of_ranks, folder, base)
    torch.save(of_mesh(base, None), folder / "0-0.pt")
    return {file.stem: torch.load(file, weights_only=False) for file in folder.glob("*.pt")}


def test_a_base_is_read_in_shares(results: Results) -> None:
    plain = results["0-0"]["loaded"]
    for place in ("1-0", "2-0", "2-1"):
        sharded = results[place]["loaded"]
        assert torch.equal(sharded["logits"], plain["logits"])
        assert all(torch.equal(sharded["weights"][name], each) for name, each in plain["weights"].items())
    held = [results[place]["loaded"]["held"] for place in ("2-0", "2-1")]
    assert sum(held) == plain["held"] == results["1-0"]["loaded"]["held"]
    assert max(held) < 0.52 * plain["held"]


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_at_any_number_of_ranks(results: Results, name: str) -> None:
    tolerance = 1e-10 if name == "double" else 2e-3 if name == "sixteen" else 1e-5
    reference = results["1-0" if name == "sixteen" else "0-0"][name]
    for place in ("1-0", "2-0", "2-1") if name in ON_ONE_RANK else ("2-0", "2-1"):
        curve, expected = (torch.tensor(each["curve"]) for each in (results[place][name], reference))
        assert ((curve - expected).abs() / expected).max() < tolerance
        assert results[place][name]["types"] == reference["types"]
        for weight, wanted in reference["weights"].items():
            apart = (results[place][name]["weights"][weight] - wanted).norm() / wanted.norm()
            assert apart < 100 * tolerance, weight  # Adam divides small gradients by small numbers
    assert expected[-1, 0] < expected[0, 0]


def test_masters_stay_in_their_type(results: Results) -> None:
    assert results["2-0"]["sixteen"]["types"] == {torch.float32}
    assert results["2-0"]["qlora"]["types"] == {torch.float32}


D, KV, F, HEADS, RANK = 64, 32, 160, 4, 2
WIDE = ModelShape(hidden_size=D, feed_forward_size=F, layers=2, heads=HEADS, kv_heads=2, context=128)
KEPT: dict[Recompute, int] = {"full": D, "selective": 5 * D + 2 * KV + 2 * F + HEADS, "none": 11 * D + 4 * F + HEADS}


def kept(settings: Settings) -> float:
    """Numbers that a forward pass leaves behind, per token."""
    model, inputs = trainee(settings), inputs_of(batch([[128]], length=128), CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        loss = model(inputs)
    left = sum(event.self_cpu_memory_usage for event in watch.events())
    loss.backward()
    return float(left) / 128 / 4


@pytest.mark.parametrize("mode", KEPT)
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_blocks_keep_what_is_stated(mode: Recompute, adapted: bool) -> None:
    """`plan.py` computes memory from it."""
    settings = replace(SETTINGS, recompute=mode, lora=LoraSettings(rank=RANK, dropout=0.0) if adapted else None)
    two, four = (kept(replace(settings, model=replace(WIDE, layers=layers))) for layers in (2, 4))
    stated = KEPT[mode] + (7 * RANK - 2 * D if adapted and mode == "none" else 0)
    assert (four - two) / 2 == pytest.approx(stated, rel=0.05, abs=12)  # the state of the generator is 10


def test_names_are_those_of_a_checkpoint() -> None:
    name = "model.layers.3._orig_mod._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert plain_name(name) == "model.layers.3.mlp.up_proj.weight"
