"""LoRA and QLoRA, and their merge into the base."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.finetune.adapters import adapter_state, merge_into_base
from koala_local.finetune.model import Trainee, base_config, build
from koala_local.finetune.settings import LoraSettings, Settings
from koala_local.finetune.sharding import plain_name
from safetensors.torch import load_file

from koala_local.errors import KoalaError

from .tiny import CPU, SETTINGS, batch, checkpoint, distance, gradients, loss_of, trainee

PACKED = batch([[20, 30, 13], [40]])
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0)


def tuned(folder: Path, lora: LoraSettings = LORA, **changes: Any) -> Trainee:
    """Over a base, its adapters moved away from where they start."""
    settings = replace(SETTINGS, model=None, lora=lora, **changes)
    model = build(base_config(folder, 64), folder, settings, device=CPU, mesh=None)
    draw = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0.0, 0.1, generator=draw)
    return model


def state(model: Trainee) -> dict[str, torch.Tensor]:
    return adapter_state({plain_name(name): each.detach() for name, each in model.model.named_parameters()})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def test_adapters_start_as_the_base() -> None:
    plain, adapted = trainee(), trainee(replace(SETTINGS, lora=LORA))
    assert loss_of(adapted, PACKED).item() == loss_of(plain, PACKED).item()
    found = state(adapted)
    assert len(found) == 2 * 7 * 2
    again = state(trainee(replace(SETTINGS, lora=LORA)))
    assert all(torch.equal(found[name], again[name]) for name in found)
    down = found["model.layers.0.mlp.down_proj.lora_A.default.weight"]
    assert down.shape == (4, 48)
    assert 0.9 * 48**-0.5 < float(down.abs().max()) <= 48**-0.5


def test_merged_as_peft_merges(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, torch.float32)
    model = tuned(folder)
    found = dict(merge_into_base(folder, state(model), LORA))
    for module in model.model.modules():
        if hasattr(module, "merge"):
            module.merge()
    merged = {name.replace(".base_layer.", "."): each for name, each in model.model.state_dict().items()}
    assert found.keys() == stored(folder).keys()
    assert all(torch.equal(found[name], merged[name]) for name in found)
    assert not torch.equal(
        found["model.layers.1.mlp.up_proj.weight"], stored(folder)["model.layers.1.mlp.up_proj.weight"]
    )


def test_a_merged_base_computes_what_base_and_adapters_do(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, torch.float64)
    model = tuned(folder, master_dtype="float64")
    plain = build(base_config(folder, 64), folder, double(), device=CPU, mesh=None)
    plain.model.load_state_dict(dict(merge_into_base(folder, state(model), LORA)))
    assert abs(loss_of(model, PACKED).item() / loss_of(plain, PACKED).item() - 1) < 1e-12


def double() -> Settings:
    return replace(SETTINGS, model=None, master_dtype="float64")


def test_merged_into_sixteen_bits_rounds_once(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    adapters = state(tuned(folder))
    name = "model.layers.0.self_attn.q_proj"
    found = dict(merge_into_base(folder, adapters, LORA))[f"{name}.weight"]
    a, b = (adapters[f"{name}.lora_{each}.default.weight"].double() for each in "AB")
    exact = stored(folder)[f"{name}.weight"].double() + b @ a * (LORA.alpha / LORA.rank)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8).all()  # half a unit in the last place, and a hair


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    name = "model.layers.7.self_attn.q_proj.lora_{}.default.weight"
    strange = {name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(32, 4)}
    with pytest.raises(KoalaError, match=r"model\.layers\.7\.self_attn\.q_proj\.weight has no weight"):
        list(merge_into_base(folder, strange, LORA))


FOUR_BIT = replace(LORA, four_bit=True)


def test_four_bits_are_near_sixteen_and_train(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(tmp_path, hidden_size=64, feed_forward_size=128)
    whole, quantized = tuned(folder), tuned(folder, FOUR_BIT)
    linear = quantized.model.model.layers[0].mlp.up_proj.base_layer
    assert linear.weight.dtype == torch.uint8 and linear.weight.numel() == 64 * 128 // 2
    loss, found = gradients(whole, PACKED)
    near, others = gradients(quantized, PACKED)
    assert loss != near
    assert abs(near / loss - 1) < 0.02
    assert distance(found, others) < 0.3
    for mode in ("selective", "full"):
        again, same = gradients(tuned(folder, FOUR_BIT, recompute=mode), PACKED)
        assert again == near and distance(others, same) < 1e-6
    assert copy.copy(quantized.config).vocab_size == 61


@pytest.mark.parametrize(("library", "lora"), [("peft", LORA), ("bitsandbytes", FOUR_BIT)])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, library: str, lora: LoraSettings) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(KoalaError, match=f"needs {library}") as failure:
        trainee(replace(SETTINGS, lora=lora))
    assert "pip install" in failure.value.hint
