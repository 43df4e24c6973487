"""AdamW, its schedule and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from koala_local.errors import KoalaError

from .settings import Settings


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over what is trained of `model`, which must be sharded already and not have run yet. Matrices decay, the
    embedding and the head among them, as is usual; norms and biases do not.

    State: two numbers of the masters' type per trained parameter; with "adamw8bit" (torchao) two bytes and their
    scales, for tensors of 4096 numbers or more. torchao compiles its step, on the CPU by a C++ compiler. Raises
    KoalaError when torchao is needed and missing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw8bit":
        return _adamw_8bit(groups, lr=settings.learning_rate, betas=betas)
    return torch.optim.AdamW(groups, fused=True, lr=settings.learning_rate, betas=betas)


def _adamw_8bit(groups: list[dict[str, object]], **options: object) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        hint = "install it: pip install 'koala-local[8bit]', or leave optimizer=adamw"
        raise KoalaError("optimizer=adamw8bit needs torchao, which is not installed", hint) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def learning_rate(step: int, total_steps: int, settings: Settings) -> float:
    """Of the step (the first is 0): linear warm-up, whose last step has the peak, then a cosine whose last step has
    `min_learning_rate` of the peak. A warm-up longer than the run is cut to it."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup + 1) / max(1, total_steps - warmup))
    lowest = settings.min_learning_rate
    return settings.learning_rate * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, which compiles its step
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients down to a norm of at most `largest`; their norm before that, the same on every rank. To be
    called by all ranks. A norm that is no finite number leaves no usable gradient: check it before the step."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
