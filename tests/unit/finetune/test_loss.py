"""The chunked cross-entropy behind the head, against torch's over whole logits."""

from __future__ import annotations

import pytest
import torch
from koala_local.finetune.loss import head_loss
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, SIZE, VOCABULARY = 37, 16, 101


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, SIZE, generator=draw, dtype=dtype) * 3
    head = torch.randn(VOCABULARY, SIZE, generator=draw, dtype=dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    weights = torch.rand(TOKENS, generator=draw) * 2
    return hidden.requires_grad_(), head.requires_grad_(), targets, weights


def reference(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk", [1, VOCABULARY * 5, VOCABULARY * TOKENS, 1 << 25])
def test_exact_in_double_precision_gradients_included(chunk: int) -> None:
    inputs = example()
    expected = reference(*inputs)
    (expected * 0.3).backward()
    wanted = [inputs[0].grad, inputs[1].grad]
    again = example()
    loss = head_loss(*again, chunk=chunk)
    (loss * 0.3).backward()
    assert loss.dtype == torch.float64
    assert abs(loss.item() - expected.item()) < 1e-12 * abs(expected.item())
    for mine, theirs in zip((again[0].grad, again[1].grad), wanted, strict=True):
        assert mine is not None and theirs is not None
        assert (mine - theirs).norm() < 1e-12 * theirs.norm()


def test_gradient_agrees_with_finite_differences() -> None:
    hidden, head, targets, weights = example()
    assert torch.autograd.gradcheck(lambda h, w: head_loss(h, w, targets, weights, chunk=500), (hidden, head))


def test_sixteen_bits_are_summed_in_thirty_two() -> None:
    hidden, head, targets, weights = example(torch.bfloat16)
    loss = head_loss(hidden, head, targets, weights, chunk=VOCABULARY * 4)
    expected = reference(hidden.detach().double(), head.detach().double(), targets, weights)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < 2e-3  # the logits are rounded to 8 bits, at random
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert head.grad is not None and head.grad.dtype == torch.bfloat16


def test_no_tokens_give_zero_and_zero_gradients() -> None:
    hidden, head, targets, weights = example()
    nothing = hidden[:0]
    loss = head_loss(nothing, head, targets[:0], weights[:0])
    loss.backward()
    assert loss.item() == 0.0
    assert head.grad is not None and not head.grad.any()
    assert hidden.grad is not None and not hidden.grad.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets, weights = example()
    head_loss(hidden, head.detach(), targets, weights).backward()
    free = example()
    head_loss(*free).backward()
    assert hidden.grad is not None and free[0].grad is not None
    assert torch.equal(hidden.grad, free[0].grad)
    assert head.grad is None


class Largest(TorchDispatchMode):
    """The most numbers that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
def test_whole_logits_never_exist(training: bool) -> None:
    inputs = example()
    with Largest() as largest, torch.set_grad_enabled(training):
        loss = head_loss(*inputs, chunk=VOCABULARY * 4)
        if training:
            loss.backward()
    assert largest.numbers <= VOCABULARY * SIZE < VOCABULARY * TOKENS  # no more than the head's own gradient
