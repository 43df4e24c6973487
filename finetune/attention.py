"""Attention of packed rows: no document sees another. Registered with transformers, whose modelling code is used as is.

On CUDA (bfloat16 or float16, no attention dropout, compute capability 8.0 or newer) torch's variable-length flash
attention takes a whole micro-batch in one call. Anywhere else each document is one causal call of torch's scaled dot
product attention. In both, the cost is the sum of squares of the documents' lengths, not the square of the row's, and
no mask exists. Padding counts as a document on CUDA; elsewhere it gives zeros and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "koala_documents"  # for the configuration of a model of transformers; its blocks get `documents=Layout`
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD = 256  # the largest size of a head


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the documents of a micro-batch lie, its rows joined to one line of tokens."""

    lengths: tuple[int, ...]  # of each document and each row's padding, in their order
    skipped: tuple[bool, ...]  # which of them are padding that need not be computed
    starts: Tensor  # (documents + 1,) int32, on the device: the first token of each, and the end
    longest: int
    flash: bool  # whether the device can run the flash kernel


def layout(documents: NDArray[np.int32], device: torch.device) -> Layout:
    """Of `Batch.documents` (rows, length). Made from host memory, so that no step waits for the device. When all is
    padding it is computed all the same: ranks that share gradients must each have one for every weight."""
    begins = np.ones(documents.shape, dtype=bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = np.append(np.flatnonzero(begins), documents.size)
    lengths = np.diff(starts)
    padding = documents.reshape(-1)[starts[:-1]] < 0
    return Layout(
        tuple(lengths.tolist()),
        tuple((padding & ~padding.all()).tolist()),
        torch.from_numpy(starts.astype(np.int32)).to(device),
        int(lengths.max(initial=0)),
        _has_flash(device),
    )


def _has_flash(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Layout,
    scaling: float,
    dropout: float = 0.0,
    **ignored: Any,  # positions and the like, which transformers hands to every attention
) -> tuple[Tensor, None]:
    """Causal attention inside each document. (batch, heads, time, head size) -> (batch, time, heads, head size).
    Keys and values may have fewer heads than queries. A sliding window is ignored: no document may be longer."""
    batch, heads, time, size = query.shape
    q, k, v = (tensor.transpose(1, 2).reshape(batch * time, -1, size) for tensor in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    if documents.flash and half and size <= _FLASH_HEAD and dropout == 0.0:  # its kernel knows no dropout
        mixed = _flash(q, k, v, documents, scaling)
    else:
        mixed = _each(q, k, v, documents, scaling, dropout)
    return mixed.view(batch, time, heads, size), None


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Layout, scaling: float) -> Tensor:
    """(tokens, heads, head size) -> the same."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest, grouped = documents.starts, documents.longest, query.shape[1] != key.shape[1]
    window = (-1, 0)  # causal
    mixed = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
    )
    return torch.as_tensor(mixed)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled loop would be compiled anew for every packing
def _each(query: Tensor, key: Tensor, value: Tensor, documents: Layout, scaling: float, dropout: float) -> Tensor:
    """(tokens, heads, head size) -> the same. `split` and `cat`, whose backward passes touch each token once: a slice's
    would write the whole row for each document."""
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    parts = zip(*(torch.split(tensor, list(documents.lengths)) for tensor in (query, key, value)), strict=True)
    mixed = []
    for (q, k, v), skipped in zip(parts, documents.skipped, strict=True):
        if skipped:
            mixed.append(torch.zeros_like(q))
            continue
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))  # noqa: PLW2901  # heads first
        attended = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        mixed.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(mixed)


AttentionInterface.register(NAME, document_attention)
