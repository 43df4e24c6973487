"""The plan of the run that the command line asks for, on the machine that it is asked on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from koala_local.models.devices import ram

from .data.tokens import DialogueTokenizer
from .job import Job
from .launch import Place, current_rank, gpus_here
from .plan import Machine, Plan, Work, plan_run
from .settings import Settings
from .throughput import Numbers, known_gpu


def read_tokenizer(base: Path | None, place: Path, settings: Settings) -> DialogueTokenizer:
    """The tokenizer at `place`. Raises ModelFileError or TokenizerError unless the base can be trained, and the
    tokenizer is its own."""
    return DialogueTokenizer(place, _config(base, settings).vocab_size if base else None)


def forecast(job: Job, place: Place) -> Plan:
    """The plan of the job. Raises KoalaError for data that cannot be packed, or was made for another tokenizer."""
    settings, packed = job.settings, job.packed()
    if job.base:
        numbers = Numbers.of(_config(job.base, settings))
    else:
        assert settings.model
        numbers = Numbers.of_shape(settings.model, job.tokenizer.size)
    work = Work.of(packed.rows, packed.tokens, settings, packed.cuts)
    return plan_run(numbers, settings, work, _machine(place))


def _config(base: Path, settings: Settings) -> Any:
    from .model import base_config  # seconds of imports, which a model from scratch does not need here

    return base_config(base, settings.sequence_length)


def _machine(place: Place) -> Machine:
    ranks = max(place.ranks, current_rank().world_size)
    if not place.gpus:
        return Machine(0, ram()[0] or math.inf)
    if gpus_here() < place.gpus:
        return Machine(ranks, None)
    import torch

    memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(place.gpus))
    return Machine(ranks, memory, known_gpu(torch.cuda.get_device_name(0)))
