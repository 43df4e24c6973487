"""Document attention against a dense block mask, and what the flash kernel would be handed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from koala_local.finetune import attention
from koala_local.finetune.attention import Layout, document_attention, layout
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
HEADS, SIZE = 4, 8
DOCUMENTS = np.array([[0] * 7 + [1] + [2] * 12 + [-1] * 4, [0] * 10 + [1] * 14, [-1] * 24], dtype=np.int32)


def example(kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    rows, time = DOCUMENTS.shape
    return [
        torch.randn(rows, heads, time, SIZE, generator=draw, dtype=dtype).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By a mask of (time, time), padding zeroed."""
    documents = torch.from_numpy(DOCUMENTS)
    same = documents[:, :, None] == documents[:, None, :]
    mask = same.tril()[:, None]
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    return mixed.transpose(1, 2) * (documents >= 0)[:, :, None, None]


def mine(*tensors: Tensor) -> Tensor:
    return attend(*tensors, where=layout(DOCUMENTS, CPU))


def attend(query: Tensor, key: Tensor, value: Tensor, *, where: Layout) -> Tensor:
    return document_attention(nn.Module(), query, key, value, None, documents=where, scaling=0.3)[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_same_as_a_dense_block_mask(kv_heads: int) -> None:
    here, there = example(kv_heads), example(kv_heads)
    pull = torch.randn(3, 24, HEADS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, wanted = mine(*here), dense(*there)
    (got * pull).sum().backward()
    (wanted * pull).sum().backward()
    assert (got - wanted).abs().max() < 1e-12
    for one, other in zip(here, there, strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).abs().max() < 1e-12


def test_layout_of_rows_with_padding() -> None:
    found = layout(DOCUMENTS, CPU)
    assert found.lengths == (7, 1, 12, 4, 10, 14, 24)
    assert found.skipped == (False, False, False, True, False, False, True)
    assert found.starts.tolist() == [0, 7, 8, 20, 24, 34, 48, 72]
    assert found.starts.dtype == torch.int32
    assert found.longest == 24


def test_a_micro_batch_of_padding_is_computed() -> None:
    assert layout(DOCUMENTS[2:], CPU).skipped == (False,)


class Squares(TorchDispatchMode):
    """The sum of squared lengths over all calls of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "scaled_dot_product" in str(func):
            self.total += args[0].shape[-2] ** 2
        return func(*args, **(kwargs or {}))


def test_the_cost_is_of_the_documents_not_of_the_row() -> None:
    documents = np.repeat(np.arange(64, dtype=np.int32), 16)[None]
    tensors = [torch.randn(1, HEADS, 1024, SIZE) for _ in range(3)]
    with Squares() as squares:
        attend(*tensors, where=layout(documents, CPU))
    assert squares.total == 64 * 16**2


def varlen_by_its_description(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    starts_k: Tensor,
    longest: int,
    longest_k: int,
    **options: Any,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as documented, for the options that are used."""
    assert options.pop("window_size") == (-1, 0)  # causal
    assert options.pop("enable_gqa") == (query.shape[1] != key.shape[1])
    assert starts.dtype == torch.int32 and starts is starts_k and longest == longest_k == int(starts.diff().max())
    out = torch.empty_like(query)
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        out[begin:end] = scaled_dot_product_attention(q, k, v, is_causal=True, **options)[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_flash_kernel_is_called_as_documented(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_its_description)
    tensors = [tensor.detach() for tensor in example(kv_heads, torch.bfloat16)]
    wanted = dense(*tensors)
    got = mine(*tensors)
    real = torch.from_numpy(DOCUMENTS >= 0)
    assert (got - wanted)[real].abs().max() < 2e-2
    assert got[~real].any()  # here padding is a document: the kernel ran
    exact = [tensor.double() for tensor in tensors]
    assert not mine(*exact)[~real].any()  # and here it did not: it knows 16 bits only


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_on_cuda_agrees_with_each_document_alone(kv_heads: int) -> None:
    cuda = torch.device("cuda")
    here = [tensor.detach().to(cuda, torch.bfloat16).requires_grad_() for tensor in example(kv_heads)]
    there = [tensor.detach().to(cuda, torch.float32).requires_grad_() for tensor in here]
    where: Layout = layout(DOCUMENTS, cuda)
    real = torch.from_numpy(DOCUMENTS >= 0).to(cuda)[:, :, None, None]
    results = [attend(*tensors, where=where) * real for tensors in (here, there)]
    for result in results:
        result.float().square().sum().backward()
    assert (results[0] - results[1]).abs().max() < 2e-2
    for one, other in zip(here, there, strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).norm() < 2e-2 * other.grad.norm()
