"""Training that was killed, stopped, or ran out of disk: it goes on, and ends as if nothing had been."""

from __future__ import annotations

import re
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.finetune_runs import SETTINGS, SHAPE, Training, losses, make_dialogues, make_tokenizer

SAVE_EVERY = 5


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Arguments of every run here."""
    folder = tmp_path_factory.mktemp("finetune")
    data, tokenizer = make_dialogues(folder / "sums.jsonl"), make_tokenizer(folder / "tokenizer")
    return ("--data", data, "--tokenizer", tokenizer, "--gpus", "0", *SHAPE, *SETTINGS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, common: tuple[str | Path, ...]) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference")
    status, errors = Training(folder, *common, "-o", folder / "run").finish()
    assert status == 0, errors
    return folder / "run"


def saved_steps(out: Path) -> list[int]:
    names = [path.name for path in (out / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if not name.endswith(".partial"))


def unfinished_steps(out: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*.partial")]


def test_killed_twice_it_ends_with_the_same_bytes(
    tmp_path: Path, common: tuple[str | Path, ...], reference: Path
) -> None:
    out = tmp_path / "run"
    seen: dict[int, float] = {}
    for number, step in enumerate((13, 27)):
        training = Training(tmp_path, *common, "-o", out, *(["--resume"] if number else []))
        training.wait_for(out, step)
        training.send(signal.SIGKILL)
        training.finish()
        seen |= losses(out)
        last = max(losses(out))
        begun = max(unfinished_steps(out), default=last)  # a checkpoint that was being written is lost, too
        assert last - saved_steps(out)[-1] <= SAVE_EVERY + last - begun
        assert last - begun <= SAVE_EVERY
        assert not (out / "config.json").exists()
    status, errors = Training(tmp_path, *common, "-o", out, "--resume").finish()
    assert status == 0, errors
    assert losses(out) == losses(reference)
    assert all(losses(reference)[step] == loss for step, loss in seen.items())
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends(
    tmp_path: Path, common: tuple[str | Path, ...], reference: Path, number: int, status: int
) -> None:
    out = tmp_path / "run"
    training = Training(tmp_path, *common, "-o", out)
    training.wait_for(out, 8)
    training.send(number)
    found, errors = training.finish()
    assert found == status, errors
    last = max(losses(out))
    assert saved_steps(out)[-1] == last < 40
    assert "--resume" in errors
    if number == signal.SIGTERM:
        found, errors = Training(tmp_path, *common, "-o", out, "--resume").finish()
        assert found == 0, errors
        assert losses(out) == losses(reference)
        assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def test_a_second_signal_ends_it_at_once(tmp_path: Path, common: tuple[str | Path, ...]) -> None:
    """The first one is not enough while a step takes long: here one of 20 000 rows."""
    out = tmp_path / "run"
    settings = ("epochs=500", "max_steps=10", "global_batch=20000", "micro_batch=64")
    training = Training(tmp_path, *common, *settings, "-o", out)
    while not (out / "log.jsonl").exists():
        assert training.process.is_alive(), training.finish()
        time.sleep(0.02)
    time.sleep(1.0)
    training.send(signal.SIGTERM)
    time.sleep(0.5)
    assert training.process.is_alive()
    begun = time.monotonic()
    training.send(signal.SIGTERM)
    assert training.finish()[0] in (143, -signal.SIGTERM)
    assert time.monotonic() - begun < 3
    assert saved_steps(out) == []


def test_a_disk_that_fills_up(tmp_path: Path, common: tuple[str | Path, ...], reference: Path) -> None:
    out = tmp_path / "run"
    training = Training(tmp_path, *common, "-o", out)
    training.wait_for(out, 11)  # the second checkpoint is begun once the first is whole
    resource.prlimit(training.process.pid or 0, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    status, errors = training.finish()
    assert status == 1
    assert "cannot be written: File too large" in errors and "free some space" in errors
    kept = saved_steps(out)
    assert kept and re.search(rf"step-{kept[-1]:08} is the last one", errors)
    assert list((out / "checkpoints").glob("*.partial")) == []
    status, errors = Training(tmp_path, *common, "-o", out, "--resume").finish()
    assert status == 0, errors
    assert losses(out) == losses(reference)


def test_another_recipe_or_setting_is_refused(tmp_path: Path, common: tuple[str | Path, ...], reference: Path) -> None:
    """`reference` is finished; what is asked here comes before that matters."""
    out = tmp_path / "run"
    training = Training(tmp_path, *common, "-o", out)
    training.wait_for(out, 6)
    training.send(signal.SIGTERM)
    assert training.finish()[0] == 143
    status, errors = Training(tmp_path, *common, "learning_rate=1e-3", "-o", out, "--resume").finish()
    assert status == 1
    assert "learning_rate was 0.003 and is 0.001" in errors
    other = make_dialogues(tmp_path / "sums.jsonl", seed=2)
    status, errors = Training(tmp_path, *common, "--data", other, "-o", out, "--resume").finish()
    assert status == 1
    assert "changed since the run" in errors


def test_a_changed_recipe_is_refused(tmp_path: Path, common: tuple[str | Path, ...]) -> None:
    out, recipe = tmp_path / "run", tmp_path / "mine.toml"
    text = f'epochs = 20\n[sources.sums]\nfiles = ["{common[1]}"]\n'
    recipe.write_text(text)
    new = (*common, "--data", recipe, "-o", out)
    training = Training(tmp_path, *new)
    training.wait_for(out, 6)
    training.send(signal.SIGTERM)
    assert training.finish()[0] == 143
    for what, changed in (("sources", f"{text}weight = 2\n"), ("epochs", text.replace("20", "30"))):
        recipe.write_text(changed)
        status, errors = Training(tmp_path, *new, "--resume").finish()
        assert status == 1
        assert f"the recipe's {what} changed since the run" in " ".join(errors.split())
    recipe.write_text(text)
    status, errors = Training(tmp_path, *new, "--resume").finish()
    assert status == 0, errors
