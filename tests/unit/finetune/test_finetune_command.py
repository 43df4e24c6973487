"""What `koala finetune` refuses, and in which words. Nothing here trains for more than a few steps."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from koala_local.finetune.command import finetune
from koala_local.finetune.data.tokens import DialogueTokenizer
from koala_local.finetune.prepare import training
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from koala_local.errors import KoalaError, OutOfMemoryError
from tests.finetune_runs import SETTINGS, SHAPE, losses, make_dialogues, make_tokenizer


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """A run silences libraries, in a process that is its own."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dialogues(tmp_path_factory.mktemp("data") / "sums.jsonl", 40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(*arguments: str | Path) -> Any:
    """The command's return value. Raises what it raises."""
    return finetune.main([*map(str, arguments)], standalone_mode=False)


def fails(*arguments: str | Path) -> KoalaError:
    with pytest.raises(KoalaError) as caught:
        run(*arguments)
    return caught.value


def make_base(folder: Path, tokenizer: Path | None, vocabulary: int = 330) -> Path:
    """Write an untrained checkpoint of two layers and return the folder."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer:
        (folder / "tokenizer.model").write_bytes((tokenizer / "tokenizer.model").read_bytes())
    return folder


def test_the_plan_is_a_result_and_nothing_is_trained(
    tmp_path: Path, data: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    new = ("--data", data, "--tokenizer", tokenizer, "-o", out, "--gpus", "0", *SHAPE, *SETTINGS)
    assert run(*new, "--plan") == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "fits" in said and "$" in said
    assert not (out / "log.jsonl").exists() and not (out / "checkpoints").exists()
    assert run(*new, "max_steps=2") == 0  # what the plan left there is no run


def test_a_run_that_will_not_fit(
    tmp_path: Path, data: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ("model.hidden_size=65536", "model.feed_forward_size=262144", "model.layers=200", "model.heads=64")
    shape = (*large, "model.kv_heads=64", "model.context=128")
    arguments = ("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0", *SETTINGS, *shape)
    for more in (["--plan"], []):
        error = fails(*arguments, *more)
        assert isinstance(error, OutOfMemoryError) and "will not fit" in error.message
        assert "DOES NOT FIT" in "".join(capsys.readouterr())


def test_an_output_that_exists(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    new = ("--data", data, "--tokenizer", tokenizer, "--gpus", "0", *SHAPE, *SETTINGS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    error = fails(*new, "-o", tmp_path / "full")
    assert "exists already" in error.message and "--resume" in error.hint
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(*new, "-o", tmp_path / "file").message
    assert "cannot be written" in fails(*new, "-o", tmp_path / "file" / "below").message
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "precious.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_output_that_may_not_be_written(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    tmp_path.chmod(0o500)
    new = ("--data", data, "--tokenizer", tokenizer, "--gpus", "0", *SHAPE, *SETTINGS)
    assert "cannot be written" in fails(*new, "-o", tmp_path / "run").message


def test_more_gpus_than_there_are(tmp_path: Path, data: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    error = fails("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "8", *SHAPE, *SETTINGS)
    assert "--gpus 8" in error.message and "1 (NVIDIA GeForce RTX 4090)" in error.message
    assert "--plan" in error.hint
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_none_of_its_gpus(
    tmp_path: Path, data: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "run", *SHAPE, *SETTINGS, "--plan")
    assert run(*new, "--gpus", "1024", "--nodes", "2") == 0
    said = capsys.readouterr().out
    assert "each of 2048 GPUs" in said and "2048 x A100" in said
    assert all(f"fits on {kind}: " in said for kind in ("A100", "H100", "4090"))
    corpus = tmp_path / "run" / "corpus"  # of raw data a corpus is built first, which the run will take
    other = ("--data", corpus, "--tokenizer", tokenizer, "-o", tmp_path / "other", *SHAPE, *SETTINGS)
    assert run(*other, "--gpus", "8", "--plan") == 0
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_is_no_run_to_resume(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    new = ("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "llama", "--gpus", "0", *SHAPE, *SETTINGS)
    assert "holds a checkpoint and no run" in fails(*new, "--resume").message


def test_two_runs_in_one_folder(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    new = ("--data", data, "--tokenizer", tokenizer, "-o", out, "--gpus", "0", *SHAPE, *SETTINGS, "max_steps=1")
    with training(out):
        error = fails(*new, "--resume")
    assert "another process is training" in error.message and error.hint
    assert not (out / "log.jsonl").exists()
    assert run(*new, "--resume") == 0
    with pytest.raises(KoalaError, match="is finished"), training(out):
        pass  # it ended while this one came to its start


def test_a_tokenizer_is_read_once(tmp_path: Path, data: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    before = DialogueTokenizer.__init__

    def counted(self: DialogueTokenizer, path: Path, *more: Any) -> None:
        read.append(path)
        before(self, path, *more)

    monkeypatch.setattr(DialogueTokenizer, "__init__", counted)
    corpus = ("--data", data, "--tokenizer", tokenizer, "--gpus", "0", "-o", tmp_path / "run")
    monkeypatch.setattr("koala_local.finetune.data.build.usable_cores", lambda: 1)
    assert run(*corpus, *SHAPE, *SETTINGS, "max_steps=1") == 0
    assert read == [tokenizer]


def test_a_base_without_a_tokenizer(tmp_path: Path, data: Path) -> None:
    base = make_base(tmp_path / "base", None)
    error = fails("--base", base, "--data", data, "-o", tmp_path / "run", "--gpus", "0", *SETTINGS)
    assert "has no tokenizer" in error.message
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_match_the_embedding(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    base = make_base(tmp_path / "base", tokenizer, vocabulary=300)
    error = fails("--base", base, "--data", data, "-o", tmp_path / "run", "--gpus", "0", *SETTINGS)
    assert "330" in error.message and "300" in error.message


def test_a_corpus_of_another_tokenizer(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    from koala_local.finetune.data.build import build, choose_recipe

    other = make_tokenizer(tmp_path / "other", size=340)
    build(choose_recipe(str(data)), tmp_path / "corpus", DialogueTokenizer(other))
    new = ("--data", tmp_path / "corpus", "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0")
    assert "another tokenizer" in fails(*new, *SHAPE, *SETTINGS).message


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}],
        [{"role": "system", "content": "be kind"}],
        [],
    ],
)
def test_data_with_nothing_to_learn(tmp_path: Path, tokenizer: Path, messages: list[dict[str, str]]) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"messages": messages}) + "\n")
    new = ("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0", *SHAPE, *SETTINGS)
    error = fails(*new)
    assert error.message and error.hint
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_data_that_is_not_there(tmp_path: Path, tokenizer: Path) -> None:
    new = ("--data", tmp_path / "none", "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0")
    assert "none" in fails(*new, *SHAPE, *SETTINGS).message


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--tokenizer", "{tokenizer}"], "--base"),
        ([*SHAPE], "--tokenizer"),
        (["--base", "{tokenizer}", *SHAPE], "exclude each other"),
        (["--tokenizer", "{tokenizer}", "--rendezvous", "host:1", *SHAPE], "--nodes"),
        (["--tokenizer", "{tokenizer}", "--gpus", "-1", *SHAPE], "--gpus"),
        (["--tokenizer", "{tokenizer}", "--gpus", "9223372036854775808", *SHAPE], "--gpus"),
        (["--tokenizer", "{tokenizer}", "--gpus", "nan", *SHAPE], "--gpus"),
        (["--tokenizer", "{tokenizer}", "--nodes", "0", *SHAPE], "--nodes"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    tmp_path: Path, data: Path, tokenizer: Path, arguments: list[str], what: str
) -> None:
    words = [word.format(tokenizer=tokenizer) for word in arguments]
    with pytest.raises(click.UsageError) as caught:
        run("--data", data, "-o", tmp_path / "run", *words, *SETTINGS)
    assert what in caught.value.format_message()
    assert not (tmp_path / "run").exists()


def test_adapters_without_a_base(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    new = ("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0", *SHAPE)
    for more in ("--lora", "--qlora", "lora.rank=4"):
        error = fails(*new, more)
        assert "nothing to adapt" in error.message and "--base" in error.hint
    assert not (tmp_path / "run").exists()


def test_a_setting_that_there_is_not(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    new = ("--data", data, "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0", *SHAPE)
    assert "learning_rate" in fails(*new, "learnig_rate=1").hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--lora"], ["--qlora"]])
def test_evaluation_changes_nothing_and_adapters_are_merged_into_the_base(
    tmp_path: Path, data: Path, tokenizer: Path, more: list[str]
) -> None:
    base, out = make_base(tmp_path / "base", tokenizer), tmp_path / "without"
    new: list[str | Path] = ["--base", base, "--data", data, "--gpus", "0", *more, *SETTINGS, "max_steps=3"]
    given: list[str | Path] = ["--tokenizer", base / "tokenizer.model"] if more else []  # a file will do as well
    assert run(*new, *given, "-o", out) == 0
    assert run(*new, "-o", tmp_path / "with", "eval_every=2") == 0
    assert losses(tmp_path / "with") == losses(out)
    before, after = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (base, out))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight") or not more}
    assert (out / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_adapters_keep_the_type_of_their_base(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    base, out = make_base(tmp_path / "base", tokenizer), tmp_path / "run"
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float16)
    model.save_pretrained(base)
    assert run("--base", base, "--data", data, "--gpus", "0", "--lora", *SETTINGS, "max_steps=1", "-o", out) == 0
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_recipe_decides_epochs_and_weights_unless_told_otherwise(
    tmp_path: Path, data: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'epochs = 3\n[sources.sums]\nfiles = ["{data}"]\nweight = 2.0\nduplicates = "keep"\n')
    new = ("--data", recipe, "--tokenizer", tokenizer, "-o", tmp_path / "run", "--gpus", "0", *SHAPE, *SETTINGS[:2])
    rows = []
    for words in ([], ["epochs=1"], ["epochs=1", "weights.sums=1"]):
        assert run(*new, *words, "--plan") == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens"))
        rows.append(int(line.split(" in ")[1].split()[0].replace(",", "")))
    assert rows[0] == pytest.approx(6 * rows[2], abs=3) and rows[1] == pytest.approx(2 * rows[2], abs=2)
