"""The logs of a run: whole lines, no step twice, curves that can be drawn."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from koala_local.finetune.live_views import TrainingView
from koala_local.finetune.run_log import RunLog, draw_curves, read_log
from koala_local.finetune.train import Step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from koala_local.errors import KoalaError


def step(number: int, loss: float = 1.5, mfu: float | None = None) -> Step:
    return Step(number, loss, 1e-4, 0.5, 1000, 5000.0, mfu, 2.0)


def test_one_object_a_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.step(step(1))
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())  # before it is closed
    assert line == {
        "step": 1, "loss": 1.5, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 1000, "tokens_per_s": 5000.0,
        "mfu": None, "memory_gb": 2.0,
    }  # fmt: skip
    log.event("evaluation", 1, {"perplexity": {"all": 7.5}, "replies": ["hi – you"]})
    log.close()
    assert read_log(log.path)[1] == {
        "event": "evaluation", "step": 1, "perplexity": {"all": 7.5}, "replies": ["hi – you"],
    }  # fmt: skip


def test_resuming_drops_what_came_after_and_what_was_cut(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for number in range(1, 8):
        log.step(step(number, loss=number))
        if number % 3 == 0:
            log.event("evaluation", number, {"perplexity": {"all": number}})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 8, "lo')
    log = RunLog(tmp_path, after=5)
    log.step(step(6, loss=60.0))
    log.close()
    lines = read_log(log.path)
    assert [(line["step"], line.get("loss")) for line in lines] == [
        (1, 1), (2, 2), (3, 3), (3, None), (4, 4), (5, 5), (6, 60.0),
    ]  # fmt: skip
    assert list(tmp_path.glob(".*")) == []


def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.step(step(1, mfu=0.4))
    log.event("evaluation", 1, {"perplexity": {"sharegpt": 8.0}})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("loss")[0].value == 1.5
    assert board.Scalars("mfu")[0].value == pytest.approx(0.4)
    assert board.Scalars("evaluation/perplexity/sharegpt")[0].value == 8.0


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a W&B that is installed, and not set up, is given: the settings, the steps, "end"."""
    logged: list[Any] = []
    board = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))

    def init(**options: Any) -> Any:
        logged.append(options["config"])
        return board

    monkeypatch.setitem(sys.modules, "wandb", cast(ModuleType, SimpleNamespace(init=init, __spec__="here")))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    return logged


def test_wandb_where_it_is_set_up(tmp_path: Path, logged: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    RunLog(tmp_path / "a").close()
    assert logged == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(tmp_path / "b", settings={"seed": 42})
    log.step(step(3))
    log.close()
    assert logged[0] == {"seed": 42} and logged[1][0] == 3 and logged[1][1]["loss"] == 1.5 and logged[2] == "end"


@pytest.mark.parametrize(
    ("netrc", "used"),
    [
        ("machine api.wandb.ai\n  login user\n  password 0123\n", True),
        ("machine example.org login user password 0123\n", False),
        ("default login user password 0123\n", False),
        ("machine api.wandb.ai what", False),
        ("", False),
    ],
)
def test_wandb_where_somebody_logged_in(
    tmp_path: Path, logged: list[Any], monkeypatch: pytest.MonkeyPatch, netrc: str, used: bool
) -> None:
    """`wandb login` leaves the key in a netrc file."""
    (tmp_path / ".netrc").write_text(netrc)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in (str(tmp_path / ".netrc"), ""):
        monkeypatch.setenv("NETRC", variable)
        RunLog(tmp_path / "run").close()
    assert logged == ([{}, "end"] * 2 if used else [])


def test_curves(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for number in range(1, 20):
        log.step(step(number, loss=5 / number))
    log.event("evaluation", 10, {"perplexity": {"a": 8.0, "b": 9.0}})
    log.event("evaluation", 19, {"perplexity": {"a": 7.0, "b": 8.0}})
    log.close()
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(KoalaError, match="cannot be written"):
        RunLog(tmp_path / "run")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(KoalaError, match="cannot be written"):
        RunLog(tmp_path / "run")


def test_the_live_line(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingView(100, 0, price=14.4) as view:
        view.step(step(1, mfu=0.453))
    line = capsys.readouterr().err
    for part in ("step 1/100", "loss 1.5000", "5,000 tokens/s", "MFU 45.3%", "2.0 GB", "left", "$0.00 so far"):
        assert part in line
    assert "$7.20 so far" in view.line(step(50), 1800.0)
    assert "MFU" not in view.line(step(50), 1.0)
