"""The loop: the same losses however a step is divided, exact resumption, and steps that cannot be used."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from koala_local.finetune.checkpoint import _describe, complete, latest
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.settings import LoraSettings, Settings
from koala_local.finetune.train import TrainingError, restore, rows_of_rank, train
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from tests.unit.finetune.toy import LENGTH, SETTINGS, SHAPE, ToyPlan, TwoRanks, changed, make_run, weights_of

GOLDEN = Path(__file__).with_name("golden_losses.json")


def losses(folder: Path, settings: Settings = SETTINGS, *, resume: bool = False) -> list[float]:
    run, steps = make_run(folder, settings)
    if resume:
        saved = latest(folder)
        assert saved
        restore(run, saved)
    train(run)
    return [step.loss for step in steps]


def close(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and max(abs(a - b) for a, b in zip(left, right, strict=True)) < 1e-5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("reference"))


def test_it_learns(reference: list[float]) -> None:
    assert len(reference) == 50
    assert np.mean(reference[-5:]) < np.mean(reference[:5]) - 1


def test_losses_are_those_of_the_golden_file(tmp_path: Path) -> None:
    """A change that should not change numbers must give these, to 1e-5. Made by this very run."""
    settings = changed(SETTINGS, max_steps=20, dropout=0.1, micro_batch=2, weight_decay=0.1)
    assert close(losses(tmp_path, settings), json.loads(GOLDEN.read_text()))


@pytest.mark.parametrize("micro_batch", [2, 3, 4, 8])
def test_accumulation_changes_nothing(tmp_path: Path, reference: list[float], micro_batch: int) -> None:
    assert close(losses(tmp_path, changed(SETTINGS, micro_batch=micro_batch)), reference)


def test_two_ranks_are_one_rank(tmp_path: Path, reference: list[float], ranks: TwoRanks) -> None:
    both = ranks.run(losses, tmp_path / "run")
    assert both[0] == both[1]
    assert close(both[0], reference)


def test_two_ranks_that_do_not_divide_the_batch(tmp_path: Path, ranks: TwoRanks) -> None:
    """Three micro-batches for two ranks, with dropout: its draws go by the place in the batch."""
    settings = changed(SETTINGS, global_batch=5, micro_batch=2, dropout=0.1, max_steps=20)
    both = ranks.run(losses, tmp_path / "run", settings)
    assert close(both[0], losses(tmp_path / "alone", settings))


def test_every_row_is_taken_once(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, changed(SETTINGS, global_batch=7, micro_batch=2))
    wanted = run.plan.step_rows(0, 7)
    found: list[NDArray[np.int64]] = []
    for number in range(3):
        run.rank = replace(run.rank, number=number, world_size=3)
        mine = rows_of_rank(run)
        assert len(mine) == 2  # every rank has as many passes
        found += [rows for _, rows in mine]
    assert sorted(np.concatenate(found)) == sorted(wanted)


def whole_and_parts(folder: Path, settings: Settings) -> tuple[list[Any], list[Any], list[str]]:
    """The loss and rate of each step of a run, the same of one that was stopped after nine steps and went on, and which
    weights differ at their ends."""
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        whole, steps = make_run(folder / "whole", settings)
        train(whole)
        first, before = make_run(folder / "parts", settings)
        first.stops = lambda: [signal.SIGTERM] if len(before) == 9 else []
        assert train(first) == signal.SIGTERM
        again, after = make_run(folder / "parts", settings)
        saved = latest(folder / "parts")
        assert saved is not None and saved.step == 9
        restore(again, saved)
        assert train(again) == 0
    final, other = weights_of(whole), weights_of(again)
    told = [[(step.loss, step.learning_rate) for step in run] for run in (steps, before + after)]
    return told[0], told[1], [name for name, tensor in final.items() if not torch.equal(tensor, other[name])]


def eight_bit_states(folder: Path, settings: Settings) -> int:
    """How many numbers of the optimizer's state have 8 bits, on this rank, after a step and after a resumption."""
    with torch.compiler.set_stance("force_eager"):
        first, _ = make_run(folder, changed(settings, max_steps=1))
        train(first)
        again, _ = make_run(folder, settings)
        saved = latest(folder)
        assert saved
        restore(again, saved)
    one, other = (sorted(map(_kind, run.optimizer.state.values())) for run in (first, again))
    assert one == other
    return one.count("OptimState8bit")


def _kind(state: Any) -> str:
    moment = state["exp_avg"]
    return type(moment.to_local() if isinstance(moment, DTensor) else moment).__name__


WIDE = changed(SETTINGS, max_steps=16, dropout=0.1, model=replace(SHAPE, hidden_size=64, feed_forward_size=128))
EIGHT_BIT = changed(WIDE, optimizer="adamw8bit")  # small tensors keep 32 bits


@pytest.mark.parametrize(
    "settings",
    [WIDE, changed(WIDE, lora=LoraSettings(rank=4, dropout=0.1)), EIGHT_BIT],
    ids=["all weights", "adapters", "states of 8 bits"],
)
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, settings: Settings) -> None:
    whole, parts, differ = whole_and_parts(tmp_path, settings)
    assert len(whole) == 16 and whole == parts and differ == []


def test_states_of_8_bits_are_resumed_by_two_ranks(tmp_path: Path, ranks: TwoRanks) -> None:
    for whole, parts, differ in ranks.run(whole_and_parts, tmp_path, EIGHT_BIT):
        assert len(whole) == 16 and whole == parts and differ == []
    assert ranks.run(eight_bit_states, tmp_path / "states", EIGHT_BIT)[0] > 0


def test_resumed_at_another_world_size(tmp_path: Path, reference: list[float], ranks: TwoRanks) -> None:
    first, _ = make_run(tmp_path / "run", changed(SETTINGS, save_every=20))
    first.stops = lambda: [signal.SIGINT] if first.done == 20 else []
    train(first)
    both = ranks.run(_resume_and_stop, tmp_path / "run")
    assert close(both[0], reference[20:35])
    last = losses(tmp_path / "run", resume=True)
    assert close(last, reference[35:])


def _resume_and_stop(folder: Path) -> list[float]:
    run, steps = make_run(folder)
    saved = latest(folder)
    assert saved
    restore(run, saved)
    run.stops = lambda: [signal.SIGINT] if run.done == 35 and run.rank.number == 1 else []  # one of them is enough
    train(run)
    return [step.loss for step in steps]


def test_a_checkpoint_is_whole_before_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a kill loses two intervals at most: that of a checkpoint that was being written, and what ran meanwhile."""
    written = threading.Event()

    def describe(*arguments: Any) -> None:
        assert written.wait(60)
        _describe(*arguments)

    monkeypatch.setattr("koala_local.finetune.checkpoint._describe", describe)
    run, steps = make_run(tmp_path, changed(SETTINGS, max_steps=13))
    training = threading.Thread(target=train, args=(run,))
    training.start()
    end = time.monotonic() + 60
    while len(steps) < 2 * SETTINGS.save_every and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(steps) == 2 * SETTINGS.save_every and complete(tmp_path) == []
    written.set()
    training.join(60)
    assert [path.name for path in complete(tmp_path)] == ["step-00000010", "step-00000013"]


@dataclass(frozen=True)
class SpoiledPlan(ToyPlan):
    """A plan with one row whose targets weigh too much, are noise, or are not there."""

    step: int = 24
    how: str = ""

    def batch(self, rows: NDArray[np.int64], loss_norm: Any = "token") -> Batch:
        batch = super().batch(rows, loss_norm)
        spoiled = np.isin(rows, self.step_rows(self.step, SETTINGS.global_batch)[2])
        weights, targets = batch.weights.copy(), batch.targets.copy()
        if self.how == "infinite":
            weights[spoiled] = np.where(weights[spoiled] > 0, np.float32(3e38), 0)
        if self.how == "empty":
            weights[:] = 0
        if self.how == "noise" and spoiled.any():
            targets = (targets + 17) % 64
            weights[spoiled] *= 1000
        return replace(batch, weights=weights, targets=targets)


@pytest.mark.parametrize(
    ("how", "what"), [("infinite", "loss|gradient"), ("noise", "over the mean of the steps before")]
)
def test_a_bad_step_stops_with_its_rows_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, what: str
) -> None:
    monkeypatch.setattr("koala_local.finetune.train._WINDOW", 10)  # losses still fall fast: over more steps they vary
    plan = SpoiledPlan(how=how)
    run, steps = make_run(tmp_path, changed(SETTINGS, spike_limit=0.2), plan=plan)
    run.name_rows = lambda rows: f"rows {rows.tolist()}"
    before = []
    run.tell = lambda step: before.append(weights_of(run)) or steps.append(step)  # type: ignore[func-returns-value]
    with pytest.raises(TrainingError, match=what) as caught:
        train(run)
    assert len(steps) == 24
    guilty = plan.step_rows(24, 4)[2]
    assert "step 25 has" in caught.value.message and f"rows [{guilty}]" in caught.value.message
    assert ("spike_limit=0" in caught.value.hint) == (how == "noise")  # nothing helps a loss that is no number
    assert [path.name for path in complete(tmp_path)] == ["step-00000015", "step-00000020"]
    now = weights_of(run)
    assert all(torch.equal(tensor, now[name]) for name, tensor in before[-1].items())


def test_a_spike_among_the_first_steps_stops_too(tmp_path: Path) -> None:
    wild = changed(SETTINGS, learning_rate=30.0, warmup_steps=0, clip=1e9, save_every=50)
    run, steps = make_run(tmp_path, wild)
    with pytest.raises(TrainingError, match="over the highest of the steps before") as caught:
        train(run)
    assert 1 <= len(steps) < 10 and max(step.loss for step in steps) < steps[0].loss + 6
    assert "spike_limit=0" in caught.value.hint


def test_steps_that_differ_as_their_sources_do_are_no_spike(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path, changed(SETTINGS, max_steps=1, spike_limit=0.5))
    run.losses = [0.5, 4.5] * 10
    train(run)
    assert 3.5 < steps[0].loss < 9


def test_a_spike_passes_when_told_so(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path, changed(SETTINGS, spike_limit=0.0, max_steps=26), plan=SpoiledPlan(how="noise"))
    train(run)
    assert len(steps) == 26


def test_a_step_without_targets_is_no_nan(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path, changed(SETTINGS, max_steps=2), plan=SpoiledPlan(how="empty"))
    train(run)
    assert [step.loss for step in steps] == [0.0, 0.0]


def test_what_a_step_tells(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path, changed(SETTINGS, max_steps=3), mfu=lambda speed: speed / 1e6)
    train(run)
    assert [step.step for step in steps] == [1, 2, 3]
    for step in steps:
        batch = run.plan.batch(run.plan.step_rows(step.step - 1, 4))
        assert step.tokens == batch.tokens <= 4 * LENGTH
        assert step.mfu == step.tokens_per_s / 1e6 > 0
        assert step.grad_norm > 0 and 0.05 < step.memory_gb < 4
    assert steps[0].learning_rate == pytest.approx(
        SETTINGS.learning_rate / 3
    )  # a warm-up longer than the run is cut to it


def test_evaluation_comes_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    run, steps = make_run(tmp_path, changed(SETTINGS, max_steps=11, eval_every=4))
    at: list[int] = []

    def evaluate(step: int) -> None:
        run.trainee.eval()
        at.append(step)

    run.evaluate = evaluate
    train(run)
    assert at == [4, 8, 11]
    assert SHAPE.layers == 2 and run.trainee.training and len(steps) == 11
