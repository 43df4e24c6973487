"""The end of a run: its weights as a Hugging Face checkpoint, the curves and the card, in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from koala_local import __version__

from .adapters import adapter_state, merge_into_base
from .export import Dtype, SpecialIds, export, exported_weights
from .job import Job
from .model import compute_dtype
from .model_card import Training, model_card
from .packing import PackPlan
from .run_log import LOG, draw_curves, read_log
from .tokens import DialogueTokenizer
from .train import Run


def finish(job: Job, run: Run, plan: PackPlan, tokenizer: DialogueTokenizer) -> None:
    """Write everything. All ranks must call this. Raises KoalaError when it cannot be written."""
    weights = _final_weights(job, run)
    narrow = compute_dtype(run.settings, run.device) == torch.bfloat16
    dtype: Dtype = "bfloat16" if narrow else "float32"
    card = b""
    if run.rank.first:
        draw_curves(job.out)
        parameters = sum(weight.numel() for weight in weights.values())
        card = model_card(_training(job, run, plan, parameters, dtype)).encode()
    export(
        weights,
        run.trainee.config,
        job.out,
        job.tokenizer if job.tokenizer.is_dir() else job.tokenizer.parent,
        SpecialIds(tokenizer.bos, tokenizer.eos, tokenizer.vocabulary.unknown),
        dtype=dtype,
        extra_files={"README.md": card},
    )


def _training(job: Job, run: Run, plan: PackPlan, parameters: int, dtype: str) -> Training:
    return Training(
        name=job.out.resolve().name,
        base=job.base.resolve().name if job.base else None,
        base_licence=None,
        parameters=parameters,
        settings=run.settings,
        manifest=plan.corpus.manifest,
        plan=plan,
        log=read_log(job.out / LOG),
        dtype=dtype,
        version=__version__,
        context=run.trainee.config.max_position_embeddings,
        ranks=run.rank.world_size,
        gpu=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "",
    )


def _final_weights(job: Job, run: Run) -> Mapping[str, torch.Tensor]:
    """The trained weights by their names in a checkpoint; adapters are merged into the base as it is stored. Only rank
    0, which writes them, holds the merged ones."""
    trained = exported_weights(run.trainee.model)
    if run.settings.lora is None:
        return trained
    assert job.base
    adapters = {name: _whole(tensor) for name, tensor in adapter_state(trained).items()}
    merged = merge_into_base(job.base, adapters, run.settings.lora)
    return {name: tensor if run.rank.first else tensor.to("meta") for name, tensor in merged}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
