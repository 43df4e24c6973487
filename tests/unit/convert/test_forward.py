"""The layer-streamed forward against transformers, and that it reads each layer once and stays in bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.convert import forward
from koala_local.convert.estimate import estimate
from koala_local.convert.forward import INPUTS, Compute, Head, HiddenStates, stream_layers
from koala_local.convert.rotary import rotary_table

from koala_local.errors import ModelFileError
from tests.unit.convert.in_memory import InMemory, random_ids, tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama 1": {},
    "grouped heads": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 32},
    "another base and epsilon": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 20,
    },
    "llama 3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn with its options": {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}},
    "yarn with scales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn with a factor": {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    "mistral": {"sliding_window": 9, "num_key_value_heads": 2},
}


def logits_of(checkpoint: InMemory, states: HiddenStates, compute: Compute | None = None) -> list[torch.Tensor]:
    head = Head.read(checkpoint, compute)
    return [torch.cat(list(head.logits(hidden))).view(*hidden.shape[:2], -1) for hidden in states]


def expected(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_logits_equal_those_of_transformers(options: dict[str, Any]) -> None:
    model, checkpoint = tiny(**options)
    batches = [random_ids(2, 48), random_ids(1, 17, seed=2)]
    for logits, ids in zip(logits_of(checkpoint, stream_layers(checkpoint, batches)), batches, strict=True):
        want = expected(model, ids)
        assert want.std() > 0.3  # a model that says nothing would hide errors
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


REAL = {
    "llama 3.1": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192},
    "llama 3.2": {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": {**YARN, "factor": 16.0, "original_max_position_embeddings": 4096},
    "yarn, not truncated": {**YARN, "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize("parameters", REAL.values(), ids=REAL.keys())
def test_tables_of_real_sizes_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    model, checkpoint = tiny(head_dim=128, rope_parameters=parameters, max_position_embeddings=65536)
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(300)[None])
    rope = rotary_table(checkpoint.config, 300)
    torch.testing.assert_close(rope.cos, cos[0], atol=5e-5, rtol=0)
    torch.testing.assert_close(rope.sin, sin[0], atol=5e-5, rtol=0)


def test_position_matters_to_the_models_that_are_compared() -> None:
    _, plain = tiny()
    _, scaled = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5})
    a, b = (logits_of(c, stream_layers(c, [random_ids(1, 48)]))[0] for c in (plain, scaled))
    assert (a - b).abs().max() > 0.05


def test_half_precision_weights_are_computed_in_full() -> None:
    model, checkpoint = tiny()
    for parameter in model.parameters():  # not model.bfloat16(), which would round the rotary frequencies too
        parameter.data = parameter.data.bfloat16().float()
    halved = InMemory(checkpoint.config, {name: t.bfloat16() for name, t in checkpoint.state.items()})
    ids = random_ids(1, 32)
    torch.testing.assert_close(
        logits_of(halved, stream_layers(halved, [ids]))[0], expected(model, ids), atol=1e-4, rtol=0
    )


def test_every_tensor_is_read_once_for_all_batches() -> None:
    _, checkpoint = tiny()
    logits_of(checkpoint, stream_layers(checkpoint, [random_ids(1, 8, seed=i) for i in range(5)]))
    assert set(checkpoint.reads.values()) == {1}
    assert set(checkpoint.reads) == set(checkpoint.state)


def test_pieces_are_bounded_and_make_the_same_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = tiny()
    ids = [random_ids(2, 20)]
    whole = logits_of(checkpoint, stream_layers(checkpoint, ids))[0]
    monkeypatch.setattr(forward, "_ROWS", 7)
    monkeypatch.setattr(forward, "LOGITS_BYTES", 300 * 4 * 3)
    states = stream_layers(checkpoint, ids)
    pieces = list(Head.read(checkpoint).logits(states[0]))
    assert max(map(len, pieces)) == 3
    torch.testing.assert_close(torch.cat(pieces).view_as(whole), whole, atol=1e-5, rtol=1e-5)


def test_states_over_the_bound_live_in_a_file_that_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = tiny()
    ids = [random_ids(1, 12), random_ids(2, 5, seed=3)]
    in_memory = stream_layers(checkpoint, ids)
    monkeypatch.setattr(forward, "STATES_BYTES", 1000)
    on_disk = stream_layers(checkpoint, ids, folder=tmp_path)
    assert on_disk.on_disk and not in_memory.on_disk
    assert list(tmp_path.iterdir()) == []
    for a, b in zip(in_memory, on_disk, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_observers_see_what_each_linear_layer_is_given() -> None:
    model, checkpoint = tiny(num_key_value_heads=2)
    ids = random_ids(2, 10)
    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for group, names in INPUTS.items():
            module = layer.get_submodule(names[-1])
            module.register_forward_pre_hook(
                lambda _, args, key=f"{index} {group}": seen.update({key: args[0].flatten(0, 1)})
            )
    expected(model, ids)
    observed: dict[str, torch.Tensor] = {}
    stream_layers(
        checkpoint,
        [ids],
        lambda index: lambda group, x: observed.update({f"{index} {group}": x.clone()}),
    )
    assert set(observed) == set(seen) and len(seen) == 8
    for key, x in seen.items():
        torch.testing.assert_close(observed[key], x, atol=1e-4, rtol=1e-4)


def test_progress_counts_layers() -> None:
    _, checkpoint = tiny(num_hidden_layers=3)
    steps: list[tuple[int, int]] = []
    stream_layers(checkpoint, [random_ids(1, 9)], progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_half_types_stay_near() -> None:
    _, checkpoint = tiny()
    ids, half = [random_ids(1, 32)], Compute(dtype=torch.bfloat16)
    full = logits_of(checkpoint, stream_layers(checkpoint, ids))[0]
    near = logits_of(checkpoint, stream_layers(checkpoint, ids, compute=half), half)[0]
    assert near.dtype == torch.float32
    assert 0 < (near - full).abs().mean() < 0.05 * full.std()


def test_a_token_without_a_row_is_refused() -> None:
    _, checkpoint = tiny()
    for bad in (300, -1):
        with pytest.raises(ModelFileError, match="300 rows"):
            stream_layers(checkpoint, [torch.tensor([[1, bad]])])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "longrope"},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "factor": float("nan")},
        {"type": "linear", "factor": -1},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "yarn", "factor": True},
        {"rope_type": ["a list"]},
    ],
)
def test_unusable_rotary_scaling_is_refused(scaling: dict[str, Any]) -> None:
    config = replace(tiny()[1].config, rope_scaling=scaling)
    with pytest.raises(ModelFileError):
        rotary_table(config, 8)


def test_the_estimate_grows_with_the_work() -> None:
    config = tiny()[1].config
    large = replace(
        config, hidden_size=5120, feed_forward_size=13824, layers=40, heads=40, kv_heads=40, head_size=128,
        vocabulary_size=32000,
    )  # fmt: skip
    one, two = estimate(large, 4096, 2048), estimate(large, 262_144, 2048, gptq=True)
    assert 100 < one.seconds < 100_000 and two.seconds > 64 * one.seconds
    assert 1.27e9 < one.memory < 3e9 and one.disk == 0
    assert two.disk == 2 * 4 * 262_144 * 5120 and 6e9 < two.memory < 10e9
    assert "4,096 tokens" in str(one) and "temporary file" in str(two)
