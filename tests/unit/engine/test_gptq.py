"""The GPTQ engine: its logits, its KV cache, and how it serves a conversation."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from koala_local.convert.gptq.pack import PARTS, unpack
from safetensors.torch import load_file, save_file

from koala_local.chat.ledger import Answer, Exchange, Ledger
from koala_local.dialogue import KOALA, Turn
from koala_local.engine import gptq_model
from koala_local.engine.base import Engine
from koala_local.engine.cache import PrefixCache
from koala_local.engine.gptq import GptqEngine, load_gptq
from koala_local.engine.gptq_files import TensorFiles, read_layout, read_model_settings
from koala_local.engine.gptq_kernels import Unfit
from koala_local.engine.gptq_linear import Placement
from koala_local.engine.sampling import Sampling
from koala_local.errors import Interrupted, KoalaError
from tests.gptq_maker import CONTEXT, ROWS, Made, make_gptq

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_gptq(tmp_path_factory.mktemp("made") / "koala-4bit")


@pytest.fixture(scope="module")
def loaded(made: Made) -> Iterator[GptqEngine]:
    engine = load_gptq(made.folder, CONTEXT)
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: GptqEngine) -> Iterator[GptqEngine]:
    yield loaded
    loaded.resume()
    for slot in range(loaded.slots):
        loaded.crop(slot, 0)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return [1, *torch.randint(3, 340, (count - 1,), generator=torch.Generator().manual_seed(seed)).tolist()]


def difference(engine: GptqEngine, expected: torch.Tensor) -> float:
    return float((torch.tensor(engine.logits()) - expected).abs().max())


# Logits


@pytest.mark.parametrize(
    "options",
    [
        *({"bits": bits, "of_2023": old} for bits in (2, 3, 4, 8) for old in (False, True)),
        {"group_size": -1},
        {"group_size": 64, "shards": 3},
        {"config": {"tie_word_embeddings": True}},
        {"config": {"sliding_window": 20}},
        {"config": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}},
    ],
    ids=str,
)
def test_logits_are_those_of_the_dequantized_model(tmp_path: Path, options: dict[str, Any]) -> None:
    made = make_gptq(tmp_path / "model", **options)
    engine = load_gptq(made.folder, CONTEXT)
    ids = ids_of(150)
    engine.evaluate(ids, slot=0, position=0)  # three batches, the last one short
    expected = made.logits(ids)
    assert expected.std() > 0.3
    assert difference(engine, expected) < 1e-3
    engine.evaluate([7], slot=0, position=150)
    assert difference(engine, made.logits([*ids, 7])) < 1e-3
    assert engine.evaluated_tokens == 151


def test_weights_stay_packed_in_memory(loaded: GptqEngine) -> None:
    linear = loaded._model.model.layers[0].mlp.up_proj
    assert linear.qweight.shape == (64 // 8, 96) and linear.qweight.dtype == torch.int32
    assert [name for name, _ in linear.named_parameters()] == []


def test_a_folder_without_group_indices_has_the_natural_order(tmp_path: Path) -> None:
    made = make_gptq(tmp_path / "model")
    path = made.folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "g_idx" not in name}, path)
    engine = load_gptq(made.folder, CONTEXT)
    engine.evaluate(ids_of(9), slot=0, position=0)
    assert difference(engine, made.logits(ids_of(9))) < 1e-3


@pytest.mark.parametrize("of_2023", [False, True])
def test_a_linear_layer_is_multiplied_in_blocks_of_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_2023: bool
) -> None:
    monkeypatch.setattr("koala_local.engine.gptq_linear._BLOCK_BYTES", {"cpu": 1})
    made = make_gptq(tmp_path / "model", bits=3, of_2023=of_2023)
    engine = load_gptq(made.folder, CONTEXT)
    engine.evaluate(ids_of(9), slot=0, position=0)
    assert difference(engine, made.logits(ids_of(9))) < 1e-3


def test_groups_may_be_of_any_size_and_order(tmp_path: Path) -> None:
    """No program writes such files, but the format allows them."""
    made = make_gptq(tmp_path / "model", of_2023=True)
    tensors = load_file(made.folder / "gptq_model-4bit-32g.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.g_idx"] = torch.tensor([1, 0, 0, 0] * 16, dtype=torch.int32)
    save_file(tensors, made.folder / "gptq_model-4bit-32g.safetensors")
    matrix = unpack({part: tensors[f"{name}.{part}"] for part in PARTS}, 4)
    made.model.get_submodule(name).weight.data = matrix.dequantized()
    engine = load_gptq(made.folder, CONTEXT)
    engine.evaluate(ids_of(9), slot=0, position=0)
    assert difference(engine, made.logits(ids_of(9))) < 1e-3


def test_all_logits_are_those_of_each_step(engine: GptqEngine, made: Made) -> None:
    ids = ids_of(150)
    pieces = list(engine.all_logits(ids))
    with torch.inference_mode():
        expected = made.model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(np.concatenate(pieces) - expected).max() < 1e-3
    assert engine.crop(0, 1) == 0


# The KV cache


def test_what_is_cropped_is_forgotten(engine: GptqEngine, made: Made) -> None:
    ids = ids_of(100)
    engine.evaluate(ids, slot=1, position=0)
    assert engine.crop(1, 40) == 40
    engine.evaluate([5, 6], slot=1, position=40)
    assert difference(engine, made.logits([*ids[:40], 5, 6])) < 1e-3
    assert engine.crop(1, 500) == 42


def test_a_copy_goes_its_own_way(engine: GptqEngine, made: Made) -> None:
    ids = ids_of(30)
    engine.evaluate(ids, slot=0, position=0)
    engine.evaluate([9, 9, 9], slot=2, position=0)
    engine.copy(0, 2)
    engine.evaluate([11], slot=2, position=30)
    engine.evaluate([12], slot=0, position=30)
    assert difference(engine, made.logits([*ids, 12])) < 1e-3
    engine.evaluate([13], slot=2, position=31)
    assert difference(engine, made.logits([*ids, 11, 13])) < 1e-3
    engine.copy(3, 2)
    assert engine.crop(2, 10) == 0


def test_saved_state_comes_back_with_its_logits(engine: GptqEngine, made: Made, tmp_path: Path) -> None:
    ids = ids_of(70)
    engine.evaluate(ids, slot=0, position=0)
    engine.save(0, ids, tmp_path / "state")
    before = engine.evaluated_tokens
    other = load_gptq(made.folder, CONTEXT)
    assert other.cache_key == engine.cache_key
    assert other.load(3, tmp_path / "state") == ids
    other.evaluate([7], slot=3, position=70)
    engine.evaluate([7], slot=0, position=70)
    assert other.logits() == engine.logits()
    assert (other.evaluated_tokens, engine.evaluated_tokens) == (1, before + 1)


def test_an_empty_slot_can_be_saved(engine: GptqEngine, tmp_path: Path) -> None:
    engine.save(0, [], tmp_path / "state")
    assert engine.load(1, tmp_path / "state") == []


def test_a_saved_state_is_no_pickle_and_a_wrong_one_is_refused(engine: GptqEngine, tmp_path: Path) -> None:
    path = tmp_path / "state"
    engine.evaluate(ids_of(5), slot=0, position=0)
    path.write_bytes(pickle.dumps({"ids": [1]}))
    with pytest.raises(OSError):
        engine.load(0, path)
    assert engine.crop(0, 9) == 0
    small = {f"{what}.{layer}": torch.zeros(1, 4, 2, 16) for what in ("key", "value") for layer in range(2)}
    save_file({"ids": torch.tensor([1, 5]), **small}, path)
    with pytest.raises(OSError, match="another model"):
        engine.load(0, path)
    with pytest.raises(OSError):
        engine.load(0, tmp_path / "none")
    with pytest.raises(OSError):
        engine.save(0, [], tmp_path / "no" / "folder")


def test_the_cache_key_names_the_model_and_the_context(made: Made, engine: GptqEngine, tmp_path: Path) -> None:
    assert load_gptq(made.folder, 64).cache_key != engine.cache_key
    other = make_gptq(tmp_path / "other", seed=1)
    assert load_gptq(other.folder, CONTEXT).cache_key != engine.cache_key


# Interruption


def test_an_interrupt_stops_between_batches_and_keeps_what_was_done(engine: GptqEngine, made: Made) -> None:
    ids, before = ids_of(400), engine.evaluated_tokens
    evaluate_part, parts = engine._hidden, []

    def interrupting(*args: Any) -> torch.Tensor:
        hidden = evaluate_part(*args)
        parts.append(len(args[0]))
        if len(parts) == 2:
            thread = threading.Thread(target=engine.interrupt)
            thread.start()
            thread.join()
        return hidden

    engine._hidden = interrupting  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        engine.evaluate(ids, slot=0, position=0)
    del engine._hidden
    assert parts == [64, 64]
    assert engine.evaluated_tokens - before == 128
    with pytest.raises(Interrupted):
        engine.evaluate(ids[128:], slot=0, position=128)
    engine.resume()
    engine.evaluate(ids[128:], slot=0, position=128)
    assert difference(engine, made.logits(ids)) < 1e-3


def test_a_failure_inside_a_batch_leaves_the_slot_as_it_was(engine: GptqEngine, made: Made) -> None:
    ids = ids_of(20)
    engine.evaluate(ids, slot=0, position=0)
    with pytest.raises(IndexError):
        engine.evaluate([5, ROWS + 1000], slot=0, position=20)
    layer = engine._model.model.layers[1]
    layer.forward, forward = None, layer.forward  # the first layer's cache has grown when this fails
    with pytest.raises(TypeError):
        engine.evaluate([5], slot=0, position=20)
    layer.forward = forward
    engine.evaluate([6], slot=0, position=20)
    assert difference(engine, made.logits([*ids, 6])) < 1e-3


def test_a_position_that_is_not_the_slot_s_length_is_a_defect(engine: GptqEngine) -> None:
    with pytest.raises(ValueError, match="slot 0"):
        engine.evaluate([1], slot=0, position=3)


def test_a_closed_engine_says_so(made: Made) -> None:
    engine = load_gptq(made.folder, CONTEXT)
    engine.close()
    engine.close()
    with pytest.raises(KoalaError, match="no model is loaded"):
        engine.evaluate([1], slot=0, position=0)


# Under the chat


def test_a_prefix_cache_reuses_and_holds_branches(engine: GptqEngine, made: Made) -> None:
    checked: Engine = engine
    cache = PrefixCache(checked)
    first, second = ids_of(60), [*ids_of(60)[:40], *ids_of(30, seed=2)]
    assert cache.adopt(first) == 0
    cache.extend(first)
    before = engine.evaluated_tokens
    assert cache.adopt(second) == 40
    cache.extend(second[40:])
    assert engine.evaluated_tokens - before == 30
    assert difference(engine, made.logits(second)) < 1e-3
    assert cache.adopt([*first, 8]) == 60  # the other branch was held
    cache.extend([8])
    assert difference(engine, made.logits([*first, 8])) < 1e-3
    assert cache.used_cells == 70 + 61


def test_a_conversation_evaluates_each_token_once(engine: GptqEngine) -> None:
    ledger = Ledger(engine, KOALA)
    path: list[Exchange] = []
    for turn in range(5):
        before, text = engine.evaluated_tokens, f"turn {turn}"
        path.append(Exchange(Turn(text)))
        answer = ledger.reply("", path, 0, Sampling(max_tokens=6), seed=turn)
        path[-1] = Exchange(Turn(text, answer.text), answer.ids)
        assert answer.stats.prompt_tokens == answer.stats.reused_tokens + answer.stats.evaluated_tokens
        if turn:
            assert answer.stats.evaluated_tokens == len(engine.tokenize(f"USER: {text} GPT:"))
        total = answer.stats.evaluated_tokens + answer.stats.generated_tokens
        assert total <= engine.evaluated_tokens - before <= total + 1  # an end token, where the model ended itself
    assert ledger.cache.ids == ledger.ids("", path)


def test_the_same_seed_gives_the_same_reply(engine: GptqEngine) -> None:
    def reply(seed: int) -> Answer:
        ledger = Ledger(engine, KOALA)
        return ledger.reply("", [Exchange(Turn("hello"))], 0, Sampling(temperature=1.0, max_tokens=20), seed)

    assert reply(3).ids == reply(3).ids
    assert reply(3).ids != reply(4).ids


@pytest.mark.parametrize("problem", [Unfit("no layer for 7 x 9"), torch.OutOfMemoryError("no room\nfor it")])
def test_where_gptqmodels_layers_fail_the_own_ones_stay(
    made: Made, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    calls = []

    def build(*arguments: object) -> str:
        calls.append(len(arguments))
        if len(arguments) == 5:
            raise problem
        return "own"

    monkeypatch.setattr(gptq_model, "installed", lambda: True)
    monkeypatch.setattr(gptq_model, "Kernels", lambda *_: SimpleNamespace(name="theirs"))
    monkeypatch.setattr(gptq_model, "build_model", build)
    settings = (read_model_settings(made.folder), read_layout(made.folder), TensorFiles(made.folder))
    reason = f"own layers: {str(problem).splitlines()[0]}"
    assert gptq_model.load_model(*settings, Placement("cuda", torch.float16)) == ("own", reason)
    assert gptq_model.load_model(*settings, Placement("cpu", torch.float32)) == ("own", "")
    assert calls == [5, 4, 4]
