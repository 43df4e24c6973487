"""What a run leaves behind while it runs: log.jsonl and TensorBoard always, Weights & Biases where it is set up, and a
picture of the curves at the end. Written by rank 0 alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from koala_local.disk import replacing, write_whole
from koala_local.errors import KoalaError

if TYPE_CHECKING:
    from .train import Step

LOG, CURVES = "log.jsonl", "curves.png"
_WANDB = "api.wandb.ai"
_PANELS = (
    ("loss", "nats a token"),
    ("learning_rate", ""),
    ("grad_norm", "before clipping"),
    ("tokens_per_s", "all ranks"),
)


class RunLog:
    """The logs in the run's folder. Every line is handed to the system at once: what was reported survives a kill."""

    def __init__(self, folder: Path, *, after: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        """`after`: go on after this step; what an earlier process wrote of later ones is dropped. Raises KoalaError
        when the folder cannot be written."""
        self.path = folder / LOG
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, after)
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise KoalaError(f"{str(self.path)!r} cannot be written: {error.strerror}", "check the folder") from None
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)
        self._wandb = _start_wandb(folder, dict(settings or {}))

    def step(self, step: Step) -> None:
        """Log one optimizer step."""
        values = asdict(step)
        self._write(values)
        self._scalars({key: value for key, value in values.items() if key != "step" and value is not None}, step.step)

    def event(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Log something else, such as an evaluation; numbers, also those in a mapping, go to the curves."""
        self._write({"event": name, "step": step, **values})
        numbers: dict[str, float] = {}
        for key, value in values.items():
            inner = value if isinstance(value, Mapping) else {"": value}
            numbers |= {
                f"{name}/{key}/{part}".rstrip("/"): number
                for part, number in inner.items()
                if isinstance(number, int | float) and not isinstance(number, bool)
            }
        self._scalars(numbers, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, values: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            hint = "free some space, then go on with --resume"
            raise KoalaError(f"{str(self.path)!r} cannot be written: {error.strerror}", hint) from None

    def _scalars(self, numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(_parsed, lines) if line is not None]


def draw_curves(folder: Path) -> Path:
    """Write curves.png from the folder's log.jsonl and return its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines = read_log(folder / LOG)
    steps = [line for line in lines if "event" not in line]
    perplexities = _perplexities(lines)
    panels = [*_PANELS, *([("perplexity", "held out")] if perplexities else [])]
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(8, 2.2 * len(panels)), squeeze=False)
    for (name, note), axis in zip(panels, axes[:, 0], strict=True):
        if name == "perplexity":
            for source, points in perplexities.items():
                axis.plot(*zip(*points, strict=True), marker=".", label=source)
            axis.legend(fontsize="small")
        else:
            axis.plot([line["step"] for line in steps], [line[name] for line in steps], linewidth=1)
        axis.set_title(f"{name}, {note}" if note else name, fontsize="medium", loc="left")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    with replacing(folder / CURVES) as picture:
        figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    return folder / CURVES


def _perplexities(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Points by source, of the evaluations."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        found = line.get("perplexity") if line.get("event") == "evaluation" else None
        for source, value in found.items() if isinstance(found, dict) else ():
            curves.setdefault(source, []).append((line["step"], value))
    return curves


def _keep_until(path: Path, step: int) -> None:
    """Drop the log's lines of later steps, and one that was cut off."""
    if not path.exists():
        return
    kept = [line for line in read_log(path) if line.get("step", 0) <= step]
    write_whole(path, (f"{json.dumps(line, ensure_ascii=False)}\n".encode() for line in kept))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _start_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    """A W&B run, where the library is installed and somebody has set it up; else None: it would ask for a key."""
    if find_spec("wandb") is None or not _wandb_is_set_up():
        return None
    return import_module("wandb").init(
        project="koala", name=folder.name, dir=str(folder), config=settings, resume="allow"
    )


def _wandb_is_set_up() -> bool:
    """In one of its own ways: WANDB_API_KEY, WANDB_MODE, or the key that `wandb login` writes into the netrc file."""
    if {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys():
        return True
    with suppress(OSError, ValueError, RuntimeError, NetrcParseError):
        return _WANDB in netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
    return False
