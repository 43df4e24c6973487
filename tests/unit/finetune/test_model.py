"""The model to be trained: packed rows equal documents alone, first weights, and bases that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.model import Trainee, base_config, build, inputs_of
from koala_local.finetune.settings import LoraSettings, Settings
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from koala_local.errors import ModelFileError

from .tiny import CPU, SETTINGS, SHAPE, VOCABULARY, alone, batch, by_transformers, checkpoint, distance, gradients
from .tiny import trainee as new

PACKED = batch([[20, 1, 30, 13], [5] * 12, [64], [30]])
DOUBLE = replace(SETTINGS, master_dtype="float64")
LORA = LoraSettings(rank=4, dropout=0.0)


def with_moved_adapters(model: Trainee) -> Trainee:
    """B starts as zero, with which nothing flows into A."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0.0, 0.02, generator=draw)
    return model


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_packed_equals_unpacked(recompute: Any, lora: LoraSettings | None) -> None:
    for masters, tolerance in ((DOUBLE, 1e-10), (SETTINGS, 1e-5)):
        model = with_moved_adapters(new(replace(masters, recompute=recompute, lora=lora)))
        loss, packed = gradients(model, PACKED)
        expected, unpacked = gradients(model, *alone(PACKED))
        assert len(packed) == (2 * 7 * 2 if lora else 2 * 9 + 3)
        assert abs(loss / expected - 1) < tolerance
        assert distance(packed, unpacked) < tolerance


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_as_transformers_with_whole_logits(tied: bool) -> None:
    model = new(replace(DOUBLE, model=replace(SHAPE, tied_embeddings=tied)))
    loss, found = gradients(model, PACKED)
    expected, wanted = by_transformers(model, PACKED)
    assert abs(loss / expected - 1) < 1e-7  # its softmax and norms are in float32, its rotation too
    assert distance(found, wanted) < 1e-6


def test_recomputation_changes_no_bit() -> None:
    losses, found = zip(
        *(gradients(new(replace(SETTINGS, recompute=mode)), PACKED) for mode in ("none", "selective", "full")),
        strict=True,
    )
    assert losses[0] == losses[1] == losses[2]
    assert distance(found[0], found[1]) == distance(found[0], found[2]) == 0.0


@pytest.mark.parametrize("rows", [[[]], [[10]]])
def test_nothing_to_train_is_zero(rows: list[list[int]]) -> None:
    some = batch(rows)
    empty = Batch(some.ids, some.targets * 0, some.weights * 0, some.positions, some.documents)
    loss, found = gradients(new(), empty)
    assert loss == 0.0
    assert len(found) == 2 * 9 + 3
    assert not any(gradient.any() for gradient in found.values())


def test_new_weights_depend_on_the_seed_alone() -> None:
    one, torch_seed = new().model.state_dict(), torch.manual_seed(7)
    same, other = new().model.state_dict(), new(replace(SETTINGS, seed=1)).model.state_dict()
    assert torch_seed and all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert abs(float(one["model.embed_tokens.weight"].std()) - 0.02) < 1e-3
    assert abs(float(one["model.layers.1.mlp.down_proj.weight"].std()) - 0.01) < 1e-3  # 0.02 / sqrt(2 x 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_loaded_into_float32_masters(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = checkpoint(tmp_path, dtype, kv_heads=4)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = from_base(folder)
    stock: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = batch([[40]], length=40)
    logits = model(inputs_of(inputs, CPU), logits_at=torch.arange(40))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits, stock(torch.from_numpy(inputs.ids), use_cache=False).logits[0])


def test_a_tied_base_has_one_embedding(tmp_path: Path) -> None:
    model = from_base(checkpoint(tmp_path, tied_embeddings=True))
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.model.named_parameters())


def test_old_bases_in_pickles_with_stored_frequencies(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, shard="1GB")
    expected = from_base(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "pytorch_model.bin")
    found = from_base(folder).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_mistral_base(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    change_config(folder, {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64})
    loss, _ = gradients(from_base(folder), PACKED)
    change_config(folder, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert loss == gradients(from_base(folder), PACKED)[0]
    change_config(folder, {"architectures": ["MistralForCausalLM"], "sliding_window": 63})
    with pytest.raises(ModelFileError, match="64 is over the 63 tokens"):
        base_config(folder, 64)


def from_base(folder: Path, settings: Settings = SETTINGS) -> Trainee:
    return build(base_config(folder, 64), folder, replace(settings, model=None), device=CPU, mesh=None)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("open('ran', 'w')",)


def use_pickle(folder: Path, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


def use_index(folder: Path, value: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no configuration", lambda folder: (folder / "config.json").unlink(), "config.json' cannot be read"),
    ("damaged configuration", lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    ("a list", lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
    ("wrong types", lambda folder: change_config(folder, {"hidden_size": "x"}), "'hidden_size' cannot be 'x'"),
    (
        "another family",
        lambda folder: change_config(folder, {"architectures": ["GPT2LMHeadModel"]}),
        "'GPT2LMHeadModel' is not supported",
    ),
    ("code", lambda folder: change_config(folder, {"auto_map": {"AutoModel": "m.M"}}), "never run"),
    ("quantized", lambda folder: change_config(folder, {"quantization_config": {"bits": 4}}), "is quantized"),
    ("too short", lambda folder: change_config(folder, {"max_position_embeddings": 32}), "over the 32 tokens"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    ("cut off", lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "cannot be read"),
    (
        "missing tensor",
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "lacks the tensor model.norm.weight",
    ),
    (
        "unexpected tensor",
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({"model.extra": torch.ones(1)})),
        "unexpectedly, the tensor model.extra",
    ),
    (
        "wrong shape",
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)})),
        "model.norm.weight is 5 .* 32 by its config.json",
    ),
    (
        "integers",
        lambda folder: change_tensors(
            folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
        ),
        "stored as int8",
    ),
    ("code in a pickle", lambda folder: use_pickle(folder, {"model.norm.weight": Evil()}), "cannot be read"),
    ("a pickled list", lambda folder: use_pickle(folder, [1, 2]), "something else than named tensors"),
    ("index without map", lambda folder: use_index(folder, {"weight_map": 3}), "names no files"),
    ("index that leaves", lambda folder: use_index(folder, {"weight_map": {"a": "../x"}}), "not in the folder"),
    ("index of nothing", lambda folder: use_index(folder, {"weight_map": {"a": "x.safetensors"}}), "is missing"),
    ("index that lies", lambda folder: use_index(folder, {"weight_map": {"a": "model.safetensors"}}), "has no a"),
]


@pytest.mark.parametrize(("spoil", "message"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_bad_bases_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(tmp_path / "base", shard="1GB")
    spoil(folder)
    with pytest.raises(ModelFileError, match=message):
        from_base(folder)
    assert not (tmp_path / "ran").exists()


def test_two_types_on_one_rank_take_a_mesh() -> None:
    with pytest.raises(ValueError, match="takes a mesh"):
        new(replace(SETTINGS, compute_dtype="bfloat16"))


def test_compiled_blocks_compute_the_same() -> None:
    from koala_local.finetune.sharding import compile_blocks

    model, plain = new(), new()
    compile_blocks(model.model.model.layers, backend="aot_eager")
    loss, found = gradients(model, PACKED)
    expected, wanted = gradients(plain, PACKED)
    assert VOCABULARY and abs(loss / expected - 1) < 1e-6
    assert distance(found, wanted) < 1e-5
