"""Exported checkpoints: transformers and the converter read them, and a failure leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.vocabulary.read import read_vocabulary
from koala_local.finetune import export as module
from koala_local.finetune.data.tokens import DialogueTokenizer
from koala_local.finetune.export import SpecialIds, export, exported_weights
from koala_local.finetune.model import Trainee, base_config, build, shape_config
from koala_local.finetune.settings import Settings
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from koala_local.dialogue import KOALA_TEMPLATE, Dialogue, Turn
from koala_local.errors import KoalaError, ModelFileError
from tests.checkpoint_maker import tokenizer_model
from tests.unit.finetune.tiny import CPU, SHAPE
from tests.unit.finetune.toy import TwoRanks

IDS = SpecialIds(1, 2, 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    return folder


def trainee(tokenizer: Path, **changes: Any) -> Trainee:
    settings = Settings(model=replace(SHAPE, **changes), recompute="selective", dropout=0.1)
    assert settings.model
    config = shape_config(settings.model, DialogueTokenizer(tokenizer).size)
    return build(config, None, settings, device=CPU, mesh=None)


def written(model: Trainee, out: Path, tokenizer: Path, **options: Any) -> None:
    export(exported_weights(model.model), model.config, out, tokenizer, IDS, **options)


def logits_of(model: Trainee, ids: list[int]) -> torch.Tensor:
    import numpy as np
    from koala_local.finetune.data.packing import Batch
    from koala_local.finetune.model import inputs_of

    shape = (1, len(ids))
    places = np.arange(len(ids))[None]
    batch = Batch(
        np.array([ids]), np.zeros(shape, np.int64), np.zeros(shape, np.float32), places, np.zeros(shape, np.int32)
    )
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(inputs_of(batch, CPU), torch.arange(len(ids)))
    return logits.float()


@pytest.mark.parametrize(("dtype", "tied", "shard"), [("float32", False, 20_000), ("float32", True, 10**9)])
def test_transformers_loads_it_with_identical_logits(
    tmp_path: Path, tokenizer: Path, dtype: Any, tied: bool, shard: int
) -> None:
    model = trainee(tokenizer, tied_embeddings=tied)
    before = os.umask(0o022)
    sizes: list[tuple[int, int]] = []
    told = {"progress": lambda *told: sizes.append(told)}
    written(model, tmp_path / "out", tokenizer, dtype=dtype, shard_bytes=shard, **told)
    os.umask(before)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    ids = [1, 5, 9, 30, 7, 2]
    theirs = loaded(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(theirs, logits_of(model, ids), rtol=0, atol=1e-6)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) is (shard < 10**9)
    size = sum(weight.nbytes for weight in exported_weights(model.model).values())
    assert sizes[-1] == (size, size) and sizes == sorted(sizes)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o644}  # what the umask leaves, of the weights, too
    for name, weight in exported_weights(model.model).items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_the_rounded_weights(tmp_path: Path, tokenizer: Path, dtype: Any) -> None:
    model = trainee(tokenizer)
    written(model, tmp_path / "out", tokenizer, dtype=dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    for name, weight in exported_weights(model.model).items():
        assert torch.equal(loaded.state_dict()[name], weight.to(getattr(torch, dtype)))


def test_the_converter_reads_it_with_the_tokenizers_ids_and_koalas_template(tmp_path: Path, tokenizer: Path) -> None:
    model = trainee(tokenizer)
    written(model, tmp_path / "out", tokenizer, shard_bytes=20_000)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.config.bos, checkpoint.config.eos) == (1, (2,))
    assert set(checkpoint.tensors) == set(exported_weights(model.model))
    vocabulary = read_vocabulary(tmp_path / "out", checkpoint.config)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.chat_template) == (1, 2, KOALA_TEMPLATE)


@pytest.mark.parametrize("settings", [None, "{}", '{"legacy": false}'])
def test_transformers_template_gives_the_ids_of_training(tmp_path: Path, tokenizer: Path, settings: str | None) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    (folder / "tokenizer_config.json").unlink()
    if settings:
        (folder / "tokenizer_config.json").write_text(settings)
    written(trainee(folder), tmp_path / "out", folder)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [("user", "One, two"), ("assistant", "three"), ("user", "Four?")]
    said = [{"role": role, "content": text} for role, text in turns]
    text = theirs.apply_chat_template(said, tokenize=False)
    assert text == "<s>BEGINNING OF CONVERSATION: USER: One, two GPT:three</s>USER: Four? GPT:"
    first = DialogueTokenizer(folder).encode(Dialogue((Turn("One, two"),))).ids
    assert theirs.apply_chat_template(said[:1], tokenize=True, return_dict=False) == list(first)
    later = DialogueTokenizer(folder).encode(Dialogue((Turn("One, two", "three"), Turn("Four?")))).ids
    ids = theirs.apply_chat_template(said, tokenize=True, return_dict=False)
    end = list(later).index(2)
    assert ids[ids.index(2) :] == list(later)[end:]


def test_it_goes_into_a_runs_folder_and_never_over_a_checkpoint(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text("{}\n")
    model = trainee(tokenizer)
    written(model, out, tokenizer, extra_files={"README.md": b"card"})
    assert (out / "log.jsonl").exists() and (out / "README.md").read_bytes() == b"card"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(KoalaError, match="holds a checkpoint already"):
        written(model, out, tokenizer)


def test_what_an_export_that_was_killed_left_is_cleared(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard-0").write_bytes(b"half")
    written(trainee(tokenizer), tmp_path / "out", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "shard-0").exists()


def test_without_space_nothing_is_left_and_the_error_says_so(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainee(tokenizer)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(KoalaError, match="1 kB left"):
            written(model, tmp_path / "out", tokenizer)
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(KoalaError, match="No space left on device") as raised:
        written(model, tmp_path / "out", tokenizer, shard_bytes=1000)
    assert "free some space" in raised.value.hint
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_no_number_is_not_written(tmp_path: Path, tokenizer: Path) -> None:
    model = trainee(tokenizer)
    with torch.no_grad():
        model.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(KoalaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not a finite number"):
        written(model, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


def _export_sharded(tokenizer: Path, out: Path, blocked: Path) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    settings = Settings(model=SHAPE, recompute="full", dropout=0.0)
    config = shape_config(SHAPE, DialogueTokenizer(tokenizer).size)
    model = build(config, None, settings, device=CPU, mesh=init_device_mesh("cpu", (2,)))
    said = []
    for folder in (blocked, out):
        try:
            export(exported_weights(model.model), config, folder, tokenizer, IDS, dtype="float32", shard_bytes=20_000)
        except KoalaError as error:
            said.append(error.message)
    return said


def test_two_ranks_write_what_one_does_and_fail_together(tmp_path: Path, tokenizer: Path, ranks: TwoRanks) -> None:
    (tmp_path / "blocked").write_text("a file")
    said = ranks.run(_export_sharded, tokenizer, tmp_path / "two", tmp_path / "blocked")
    assert said == [[f"{str(tmp_path / 'blocked')!r} holds a checkpoint already"]] * 2
    settings = Settings(model=SHAPE, recompute="none", dropout=0.0)
    model = build(shape_config(SHAPE, DialogueTokenizer(tokenizer).size), None, settings, device=CPU, mesh=None)
    written(model, tmp_path / "one", tokenizer, dtype="float32", shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_mistral_stays_one(tmp_path: Path, tokenizer: Path) -> None:
    size = DialogueTokenizer(tokenizer).size
    llama: Any = shape_config(SHAPE, size)
    MistralForCausalLM(MistralConfig(**_sizes(llama), sliding_window=96)).save_pretrained(tmp_path / "base")
    config = base_config(tmp_path / "base", 64)
    model = build(config, tmp_path / "base", Settings(dropout=0.0, recompute="none"), device=CPU, mesh=None)
    written(model, tmp_path / "out", tokenizer, dtype="float32")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert isinstance(loaded, MistralForCausalLM)
    assert (loaded.config.sliding_window, loaded.config.num_key_value_heads) == (96, SHAPE.kv_heads)
    converted = open_checkpoint(tmp_path / "out").config
    assert (converted.architecture, converted.sliding_window) == ("MistralForCausalLM", 96)
    ids = [1, 5, 9, 30, 7, 2]
    torch.testing.assert_close(loaded(torch.tensor([ids])).logits[0], logits_of(model, ids), rtol=0, atol=1e-6)


def _sizes(config: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name) for name in (*names, "num_key_value_heads", "max_position_embeddings")}


def test_weights_are_taken_one_at_a_time(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As merged ones are made: no more of them are there than a shard has."""
    model = trainee(tokenizer)
    shards: list[int] = []
    made: list[str] = []

    def making() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in exported_weights(model.model).items():
            made.append(name)
            yield name, weight

    def saved(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        shards.append(len(made))
        save_file(tensors, path, **options)

    monkeypatch.setattr(module, "save_file", saved)
    export(making(), model.config, tmp_path / "out", tokenizer, IDS, shard_bytes=20_000)
    assert len(shards) > 2 and shards[0] < len(made) / 2


def test_weights_that_cannot_be_read_leave_nothing(tmp_path: Path, tokenizer: Path) -> None:
    model = trainee(tokenizer)

    def making() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", torch.ones(4)
        raise ModelFileError("model.safetensors: lm_head.weight cannot be read", "get it again")

    with pytest.raises(KoalaError, match=r"lm_head\.weight cannot be read"):
        export(making(), model.config, tmp_path / "out", tokenizer, IDS)
    assert list(tmp_path.iterdir()) == []
