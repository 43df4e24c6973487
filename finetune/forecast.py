"""The plan of the run that the command line asks for, on the machine that it is asked on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_local.errors import OutOfMemoryError
from koala_local.models.devices import ram

from .data.corpus import open_corpus
from .data.packing import make_plan
from .data.tokens import DialogueTokenizer
from .job import Job
from .launch import Place, current_rank
from .plan import Machine, Plan, Work, plan_run
from .settings import Settings
from .throughput import Numbers, known_gpu


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take."""

    plan: Plan

    @property
    def dollars_an_hour(self) -> float | None:
        """Of all GPUs, at the usual price; None where it is not known."""
        machine = self.plan.machine
        return machine.gpu.on_demand * machine.gpus if machine.gpu else None

    def check(self) -> None:
        """Raise OutOfMemoryError, with what would help, when it does not fit."""
        plan = self.plan
        if plan.fits:
            return
        what = f"the run takes {plan.memory.peak / 1e9:.1f} GB of {plan.machine.memory / 1e9:.1f} GB: it will not fit"
        hint = f"it would with {plan.remedies[0]}" if plan.remedies else "take a smaller model, or shorter sequences"
        raise OutOfMemoryError(what, hint)


def check_base(base: Path | None, tokenizer: Path, settings: Settings) -> None:
    """Raise ModelFileError or TokenizerError unless the base can be trained, and the tokenizer is its own."""
    size = _config(base, settings).vocab_size if base else None
    DialogueTokenizer(tokenizer, size)


def forecast(job: Job, place: Place) -> Forecast:
    """The plan of the job. Raises KoalaError for data that cannot be packed, or was made for another tokenizer."""
    settings = job.settings
    tokenizer = DialogueTokenizer(job.tokenizer)
    corpus = open_corpus(job.corpus, tokenizer.key)
    packed = make_plan(
        corpus, settings.sequence_length, epochs=settings.epochs, seed=settings.seed, weights=settings.weights
    )
    if job.base:
        numbers = Numbers.of(_config(job.base, settings))
    else:
        assert settings.model
        numbers = Numbers.of_shape(settings.model, tokenizer.size)
    work = Work.of(packed.rows, packed.tokens, settings)
    return Forecast(plan_run(numbers, settings, work, _machine(place)))


def _config(base: Path, settings: Settings) -> Any:
    from .model import base_config  # seconds of imports, which a model from scratch does not need here

    return base_config(base, settings.sequence_length)


def _machine(place: Place) -> Machine:
    ranks = max(place.ranks, current_rank().world_size)
    if not place.gpus:
        return Machine(0, ram()[0] or math.inf)
    import torch

    memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(place.gpus))
    return Machine(ranks, memory, known_gpu(torch.cuda.get_device_name(0)))
