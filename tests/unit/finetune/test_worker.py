"""What ranks hold against each other before they begin, and a run against its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from koala_local.finetune.checkpoint import Saved
from koala_local.finetune.job import Job
from koala_local.finetune.launch import Rank
from koala_local.finetune.settings import LoraSettings, Settings, as_tree
from koala_local.finetune.weights import fingerprint
from koala_local.finetune.worker import check_agreement, check_resumable, check_shared, other_draws, work
from safetensors.torch import load_file, save_file

from koala_local.errors import KoalaError, OutOfMemoryError
from tests.unit.finetune.tiny import checkpoint
from tests.unit.finetune.toy import TwoRanks


def _here() -> Rank:
    return Rank(dist.get_rank(), 2, dist.get_rank())


def _agree(*keys: str, batches: tuple[int, int] = (4, 4)) -> str:
    settings = Settings(micro_batch=batches[_here().number])
    try:
        check_agreement(_here(), {"data": keys[_here().number], "settings": json.dumps(as_tree(settings))})
    except KoalaError as error:
        return error.message
    return ""


def _agree_not() -> str:
    return _agree("one", "one", batches=(4, 2))


def _share(*folders: Path) -> str:
    try:
        check_shared(_here(), folders[_here().number])
    except KoalaError as error:
        return error.message
    return ""


def test_ranks_that_are_about_to_do_different_things_end_together(ranks: TwoRanks) -> None:
    assert ranks.run(_agree, "one", "one") == ["", ""]
    assert ranks.run(_agree, "one", "other") == ["rank 1 and rank 0 differ in their data"] * 2
    assert ranks.run(_agree_not) == ["rank 1 and rank 0 differ in their settings (micro_batch)"] * 2


def test_an_output_folder_that_is_not_shared(tmp_path: Path, ranks: TwoRanks) -> None:
    """Each rank would write its part of a checkpoint where the others' are not."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert ranks.run(_share, tmp_path / "one", tmp_path / "one") == ["", ""]
    said = ranks.run(_share, tmp_path / "one", tmp_path / "other")
    assert said[0].startswith("rank 1 does not see the folder") and said[1].startswith("rank 1 does not see")
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.parametrize(
    ("said", "told"), [("", "OutOfMemoryError"), ("CUDA out of memory.\nSee", "CUDA out of memory.")]
)
def test_a_full_gpu_is_told(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Job) -> None:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr("koala_local.finetune.worker._joined", full)
    with pytest.raises(OutOfMemoryError) as caught:
        work(cast(Job, None))
    assert caught.value.message == f"the GPU's memory is full: {told}" and "recompute=full" in caught.value.hint


def test_a_base_is_told_from_others_of_its_shape(tmp_path: Path) -> None:
    first, again = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "again", shard="1GB")
    assert fingerprint(first) == fingerprint(again)
    tensors = load_file(again / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, again / "model.safetensors")
    assert fingerprint(first) != fingerprint(again)


def test_dropout_that_will_draw_otherwise_is_told() -> None:
    saved = Saved(Path("step-00000003"), 3, {"settings": as_tree(Settings(micro_batch=4))})
    assert other_draws(saved, Settings(micro_batch=4)) == ""
    assert other_draws(saved, Settings(micro_batch=2, dropout=0.0)) == ""
    assert "micro_batch was 4 and is 2" in other_draws(saved, Settings(micro_batch=2, dropout=0.1))


def test_adapters_are_not_resumed_over_another_base() -> None:
    settings = Settings(lora=LoraSettings())
    saved = Saved(Path("step-00000003"), 3, {"plan": "p", "base": "llama", "settings": as_tree(settings)})
    check_resumable(saved, settings, "p", "llama")
    with pytest.raises(KoalaError, match="over another base"):
        check_resumable(saved, settings, "p", "koala")
    with pytest.raises(KoalaError, match="the data"):
        check_resumable(saved, settings, "q", "llama")
