"""Cross-entropy behind the head without its logits: some rows at a time, the gradients computed with the loss.

Of the (tokens, vocabulary) logits only `LOGITS` numbers exist at once. Rows of weight 0 should not be passed at all:
then a prompt costs nothing here. torch's own `linear_cross_entropy` rounds the sum to bfloat16 and is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .memory import LOGITS


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, chunk: int = LOGITS) -> Tensor:
    """sum(weights x cross-entropy of `hidden @ head.T` at `targets`), a scalar, float64 for float64 input, else
    float32. Shapes: (tokens, size), (vocabulary, size), (tokens,), (tokens,). No tokens: 0, and gradients of 0.

    Products are made in the input's type, everything after them in the result's. The gradients are made in the
    forward pass (three products instead of four). Until the backward pass that is the room of `hidden` and, unless it
    is frozen, of the head; at the peak, a chunk of logits twice or three times and the head in float32 beside."""
    rows = max(1, chunk // head.shape[0])
    total: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, weights, rows, torch.is_grad_enabled()
    )
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, rows: int, training: bool
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        into_hidden = torch.zeros_like(hidden) if training and ctx.needs_input_grad[0] else None
        into_head = torch.zeros_like(head, dtype=wide) if training and ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            weight = weights[part, None].to(wide)
            logits = (hidden[part] @ head.T).to(wide)
            logits -= logits.logsumexp(dim=1, keepdim=True)
            total -= (logits.gather(1, targets[part, None]) * weight).sum()
            if into_hidden is not None or into_head is not None:
                wrong = _gradient(logits, targets[part, None], weight).to(hidden.dtype)
                if into_hidden is not None:
                    torch.mm(wrong, head, out=into_hidden[part])
                if into_head is not None:
                    _add_product(into_head, wrong.T, hidden[part])
        ctx.save_for_backward(into_hidden, None if into_head is None else into_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        into_hidden, into_head = ctx.saved_tensors
        return (
            None if into_hidden is None else into_hidden * scale.to(into_hidden.dtype),
            None if into_head is None else into_head * scale.to(into_head.dtype),
            *(None,) * 4,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _gradient(log_probabilities: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Of the weighted loss, with respect to the logits; in the place of the log-probabilities."""
    probabilities = log_probabilities.exp_()
    probabilities.scatter_(1, targets, probabilities.gather(1, targets) - 1)
    return probabilities.mul_(weight)
