"""Keys of a run: types, limits and names, from a file and from words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from koala_local.finetune.settings import (
    LoraSettings,
    ModelShape,
    Settings,
    SettingsError,
    as_tree,
    differences,
    list_keys,
    read_settings,
    settings_from,
)

SHAPE = [f"model.{key}" for key in ("hidden_size=32", "feed_forward_size=64", "layers=2", "heads=4", "kv_heads=2")]


def test_without_anything_the_defaults() -> None:
    assert read_settings() == Settings()


def test_words_overrule_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('epochs = 3\nlearning_rate = 1e-4\nloss_norm = "sequence"\n[weights]\nhc3 = 2\n[lora]\nrank = 8\n')
    settings = read_settings(file, ["learning_rate=3e-4", "weights.sharegpt=0.5", "lora.alpha=32", "compile=true"])
    assert settings.epochs == 3.0 and isinstance(settings.epochs, float)
    assert settings.learning_rate == 3e-4
    assert settings.loss_norm == "sequence"
    assert settings.weights == {"hc3": 2.0, "sharegpt": 0.5}
    assert settings.lora == LoraSettings(rank=8, alpha=32.0)
    assert settings.compile is True


def test_options_and_a_model_from_scratch() -> None:
    assert read_settings(lora=True).lora == LoraSettings()
    assert read_settings(words=["lora.rank=4"], four_bit=True).lora == LoraSettings(rank=4, four_bit=True)
    settings = read_settings(words=[*SHAPE, "model.context=128", "sequence_length=64", "max_steps=none"])
    assert settings.model == ModelShape(32, 64, 2, 4, 2, 128)
    assert settings.max_steps is None


def test_a_tree_there_and_back() -> None:
    for shape, four_bit in (([*SHAPE, "model.context=4096"], False), ([], True)):
        settings = read_settings(words=[*shape, "weights.a=2", "max_steps=7"], four_bit=four_bit)
        assert settings_from(as_tree(settings)) == settings


def test_adapters_of_a_new_model() -> None:
    with pytest.raises(SettingsError, match="nothing to adapt"):
        read_settings(words=[*SHAPE, "model.context=4096"], lora=True)


def test_an_endless_number() -> None:
    with pytest.raises(SettingsError, match="is '9999"):
        read_settings(words=["learning_rate=" + "9" * 5000])


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("epochs", 1.5),
        ("max_steps", 10),
        ("sequence_length", 64),
        ("global_batch", 8),
        ("micro_batch", 2),
        ("learning_rate", 0.1),
        ("clip", 1.0),
        ("save_every", 5),
        ("keep", 1),
        ("lora.rank", 4),
        ("weights.sharegpt", 1.5),
    ],
)
@pytest.mark.parametrize(
    "bad", ["-1", "9223372036854775808", "nan", "inf", "-inf", "1" + "0" * 400, "x", "true", "[1]"]
)
def test_numbers_have_limits(key: str, good: float, bad: str) -> None:
    read_settings(words=[f"{key}={good}"])
    with pytest.raises(SettingsError, match=key):
        read_settings(words=[f"{key}={bad}"])


@pytest.mark.parametrize(
    "word",
    ["epochs=0", "max_steps=0", "global_batch=0", "micro_batch=0", "sequence_length=0", "learning_rate=0", "clip=0",
     "save_every=0", "keep=0", "max_steps=2.5", "seed=-1", "seed=1.5", "compile=1", "loss_norm=mean", "optimizer=sgd",
     "compute_dtype=float16", "dropout=1", "lora=8", "weights=2", "weights.a=many"],
)  # fmt: skip
def test_other_bad_values(word: str) -> None:
    with pytest.raises(SettingsError, match=word.partition("=")[0]) as caught:
        read_settings(words=[word])
    assert caught.value.hint


def test_zero_where_it_means_something() -> None:
    settings = read_settings(words=["warmup_steps=0", "eval_every=0", "dropout=0", "seed=0", "spike_limit=0"])
    assert settings.warmup_steps == 0


@pytest.mark.parametrize(
    ("word", "near"),
    [("learning_rat=1", "learning_rate"), ("lora.rnk=1", "lora.rank"), ("model.hiden_size=1", "model.hidden_size")],
)
def test_an_unknown_key_names_the_nearest(word: str, near: str) -> None:
    with pytest.raises(SettingsError, match="no setting called") as caught:
        read_settings(words=[word])
    assert near in caught.value.hint


def test_a_key_like_no_other_lists_all() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(words=["zzzz=1"])
    assert all(key in caught.value.hint for key in list_keys())


@pytest.mark.parametrize("word", ["epochs", "=3", ""])
def test_a_word_without_key_or_value(word: str) -> None:
    with pytest.raises(SettingsError, match="no setting"):
        read_settings(words=[word])


def test_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs: 3\n")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(tmp_path / "binary.toml")


def test_a_shape_is_whole_and_fits_together() -> None:
    with pytest.raises(SettingsError, match=r"model\.context"):
        read_settings(words=SHAPE)
    for word, what in [
        ("model.heads=5", "hidden_size"),
        ("model.kv_heads=3", "kv_heads"),
        ("sequence_length=256", "context"),
    ]:
        with pytest.raises(SettingsError, match=what):
            read_settings(words=[*SHAPE, "model.context=128", "sequence_length=64", word])


def test_differences_are_of_what_decides_numbers() -> None:
    before = Settings(weights={"a": 2.0})
    assert differences(before, replace(before, micro_batch=8, save_every=1, keep=9, compile=True)) == []
    assert differences(before, replace(before, learning_rate=1.0)) == ["learning_rate was 2e-05 and is 1.0"]
    assert differences(before, replace(before, weights={})) == ["weights.a was 2.0 and is not set"]
    assert differences(before, replace(before, lora=LoraSettings(rank=4)))[0] == "lora.rank was not set and is 4"
