"""The end of a run: its weights as a Hugging Face checkpoint, the curves and the card, in the run's folder."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch.distributed.tensor import DTensor

from koala_local import __version__, console
from koala_local.models.card import read_card
from koala_local.models.reference import repository_of

from .adapters import adapter_state, merge_into_base
from .data.packing import PackPlan
from .export import Dtype, SpecialIds, export, exported_weights
from .job import Job
from .launch import Rank
from .model import compute_dtype
from .model_card import Training, model_card
from .run_log import LOG, draw_curves, read_log
from .throughput import Numbers
from .train import Run
from .weights import open_checkpoint

_DTYPES: dict[torch.dtype, Dtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def finish(job: Job, run: Run, plan: PackPlan) -> None:
    """Write everything. All ranks must call this. Raises KoalaError when it cannot be written."""
    weights, dtype = _final_weights(job, run)
    tokenizer = job.tokenizer
    card = b""
    if run.rank.first:
        draw_curves(job.out)
        card = model_card(_training(job, run, plan, dtype)).encode()
    with console.progress("writing the model", "B") if run.rank.first else nullcontext() as step:
        export(
            weights,
            run.trainee.config,
            job.out,
            tokenizer.path,
            SpecialIds(tokenizer.bos, tokenizer.eos, tokenizer.vocabulary.unknown),
            dtype=dtype,
            extra_files={"README.md": card},
            progress=step,
        )


def _training(job: Job, run: Run, plan: PackPlan, dtype: str) -> Training:
    return Training(
        name=job.out.resolve().name,
        base=(repository_of(job.base.absolute()) or job.base.resolve().name) if job.base else None,
        base_licence=(read_card(job.base).licence or None) if job.base else None,
        numbers=Numbers.of(run.trainee.config),
        settings=run.settings,
        manifest=plan.corpus.manifest,
        plan=plan,
        log=read_log(job.out / LOG),
        dtype=dtype,
        version=__version__,
        ranks=run.rank.world_size,
        gpu=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "",
    )


def _final_weights(job: Job, run: Run) -> tuple[Iterable[tuple[str, torch.Tensor]], Dtype]:
    """The weights by their names in a checkpoint, and the type to store them in. Adapters are merged into the base as
    it is stored, in its type, while they are written: rank 0 alone reads it."""
    trained = exported_weights(run.trainee.model)
    if run.settings.lora is None:
        narrow = compute_dtype(run.settings, run.device) == torch.bfloat16
        return trained.items(), "bfloat16" if narrow else "float32"
    assert job.base
    adapters = {name: _whole(tensor, run.rank) for name, tensor in adapter_state(trained).items()}
    merged = merge_into_base(job.base, adapters, run.settings.lora) if run.rank.first else ()
    return merged, _DTYPES.get(open_checkpoint(job.base).dtype, "float32")


def _whole(tensor: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Gathered by all ranks, kept by the first one."""
    value = tensor.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.to("cpu" if rank.first else "meta")
