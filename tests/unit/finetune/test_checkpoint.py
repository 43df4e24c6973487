"""Checkpoints: whole or not there, damage and strangers refused, a full disk survived."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.finetune.checkpoint import CheckpointError, Checkpoints, complete, latest, load


def state(value: float, size: int = 1000) -> dict[str, Any]:
    return {"model": {"weight": torch.full((size,), value)}, "step": torch.tensor(value)}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", keep=2)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 20 kB: what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read(folder: Path, size: int = 1000) -> tuple[int, float]:
    saved = latest(folder)
    assert saved
    found = state(0.0, size)
    load(saved, found)
    assert bool((found["model"]["weight"] == found["step"]).all())
    return saved.step, float(found["step"])


def test_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state(step), {"note": f"of {step}"})
    checkpoints.wait()
    assert [path.name for path in complete(checkpoints.folder)] == ["step-00000003", "step-00000004"]
    assert read(checkpoints.folder) == (4, 4.0)
    saved = latest(checkpoints.folder)
    assert saved and saved.about["note"] == "of 4"
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-00000003", "step-00000004"}


def test_what_is_saved_is_as_it_was(checkpoints: Checkpoints) -> None:
    """The state goes on changing while it is written."""
    live = state(1.0, 3_000_000)
    checkpoints.save(1, live, {})
    live["model"]["weight"].fill_(7.0)
    live["step"].fill_(7.0)
    checkpoints.wait()
    assert read(checkpoints.folder, 3_000_000) == (1, 1.0)


def test_the_same_step_is_written_once(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1.0), {})
    checkpoints.save(1, state(2.0), {})
    checkpoints.wait()
    assert read(checkpoints.folder) == (1, 1.0)


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None


def test_what_a_kill_left_is_no_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1.0), {})
    checkpoints.wait()
    leftover = checkpoints.folder / "step-00000002.partial"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    assert read(checkpoints.folder) == (1, 1.0)
    checkpoints.save(3, state(3.0), {})
    checkpoints.wait()
    assert not leftover.exists()


def test_a_full_disk_is_told_and_the_last_one_stays(checkpoints: Checkpoints, small_files: None) -> None:
    checkpoints.save(1, state(1.0), {})
    checkpoints.wait()
    checkpoints.save(2, state(2.0, 30_000), {})
    with pytest.raises(CheckpointError, match="step-00000002 cannot be written") as caught:
        checkpoints.wait()
    assert "step-00000001 is the last one" in caught.value.message
    assert "free some space" in caught.value.hint and "--resume" in caught.value.hint
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    assert read(checkpoints.folder) == (1, 1.0)


def test_torchs_own_words_for_a_full_disk_are_not_shown(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr("koala_local.finetune.checkpoint.save_parts", fail)
    for free, what in ((0, "No space left on device; there is none yet"), (1 << 30, "unexpected pos")):
        usage = shutil.disk_usage(checkpoints.folder.parent)._replace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(CheckpointError, match=what) as caught:
            checkpoints.save(1, {"weight": torch.zeros(3)}, {}, at_once=True)
        assert ("free some space" in caught.value.hint) == (free == 0)
        checkpoints.newest = -1


def test_a_failed_save_is_told_by_the_next_one(checkpoints: Checkpoints, small_files: None) -> None:
    checkpoints.save(1, state(1.0, 30_000), {})
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written.*none yet"):
        checkpoints.save(2, state(2.0), {})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Checkpoints(tmp_path / "run", keep=2).save(1, state(1.0), {})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_torn_checkpoint_is_refused(checkpoints: Checkpoints, name: str, how: str) -> None:
    checkpoints.save(1, state(1.0), {})
    checkpoints.wait()
    path = checkpoints.folder / "step-00000001" / name
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        latest(checkpoints.folder)
    assert "step-00000001" in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"format": "other-2", "step": 1, "files": {}}', '{"format": "koala-checkpoint-1"}',
             '{"format": "koala-checkpoint-1", "step": "x", "files": {}}', "[" * 100_000]
)  # fmt: skip
def test_a_foreign_folder_is_refused(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "step-00000009"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match="step-00000009"):
        latest(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1.0), {})
    checkpoints.wait()
    saved = latest(checkpoints.folder)
    assert saved
    for other in ({"model": {"weight": torch.zeros(7)}}, {"model": {"another": torch.zeros(1000)}}):
        with pytest.raises(CheckpointError, match="another model"):
            load(saved, other)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)

    def __deepcopy__(self, _: object) -> _Evil:
        return self


def test_no_code_in_a_checkpoint_is_run(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps its metadata in a pickle."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save(1, state(1.0), {})
    checkpoints.wait()
    folder = checkpoints.folder / "step-00000001"
    evil = pickle.dumps(_Evil())
    (folder / ".metadata").write_bytes(evil)
    about = json.loads((folder / "run.json").read_text())
    about["files"][".metadata"] = len(evil)
    (folder / "run.json").write_text(json.dumps(about))
    saved = latest(checkpoints.folder)
    assert saved
    with pytest.raises(CheckpointError, match=r"names .*mkdir"):
        load(saved, state(0.0))
    assert not (tmp_path / "ran").exists()


def test_no_code_in_the_place_of_a_tensor_is_run(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps what is no tensor in pickles, and would take one for a tensor's."""
    monkeypatch.chdir(tmp_path)
    evil = state(1.0)
    evil["model"]["weight"] = _Evil()
    checkpoints.save(1, evil, {})
    checkpoints.wait()
    saved = latest(checkpoints.folder)
    assert saved
    with pytest.raises(CheckpointError, match=r"model\.weight holds more than plain values"):
        load(saved, state(0.0))
    assert not (tmp_path / "ran").exists()
