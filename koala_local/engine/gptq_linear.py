"""A linear layer of a GPTQ checkpoint that stays packed in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from koala_local.engine.gptq_layout import (
    Layout,
    dequantize_groups,
    dequantize_rows,
    pack_rows,
    unpack_rows,
    unpack_zeros,
)

_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # of dequantized weights at once; a CPU then reuses the memory

Parts = dict[str, torch.Tensor]  # the tensors of a layer, as `gptq_layout.PARTS` names them


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model computes, and in which type."""

    device: str
    dtype: torch.dtype


class QuantizedLinear(nn.Module):
    """y = x W^T with W packed as in `gptq_layout` also in memory: it is dequantized some inputs at a time."""

    qweight: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, layout: Layout, parts: Parts, place: Placement) -> None:
        super().__init__()
        self.bits = layout.bits
        inputs, outputs = len(parts["g_idx"]), parts["scales"].shape[1]
        words, groups, order = parts["qweight"], parts["g_idx"].long(), torch.arange(inputs)
        if bool((groups.diff() < 0).any()):  # act-order: bring together what shares a group
            order = groups.argsort(stable=True)
            words, groups = pack_rows(unpack_rows(words, self.bits)[order], self.bits), groups[order]
        size = inputs if layout.group_size == -1 else layout.group_size
        regular = bool((groups == torch.arange(inputs) // size).all()) and size % 32 == 0 and inputs % size == 0
        row = outputs * torch.finfo(place.dtype).bits // 8
        step = size if regular else 32  # a block holds whole groups, or at least whole words
        self._rows = max(step, _BLOCK_BYTES[place.device] // row // step * step)
        self._group = size if regular else 0
        self.register_buffer("qweight", words.to(place.device))
        self.register_buffer("zeros", unpack_zeros(parts["qzeros"], self.bits).to(place.device, place.dtype))
        self.register_buffer("scales", parts["scales"].to(place.device, place.dtype))
        self.register_buffer("groups", groups.to(place.device))
        self.register_buffer("order", order.to(place.device) if words is not parts["qweight"] else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (tokens, inputs)
        if self.order is not None:
            flat = flat[:, self.order]
        total = flat.new_zeros(len(flat), self.scales.shape[1])
        for start in range(0, len(self.groups), self._rows):
            stop = min(start + self._rows, len(self.groups))
            total.addmm_(flat[:, start:stop], self._weight_rows(start, stop))
        return total.view(*x.shape[:-1], -1)

    def _weight_rows(self, start: int, stop: int) -> torch.Tensor:
        """The weights of inputs `start` to `stop`, multiples of 32 and of the group size: (inputs, outputs)."""
        words = self.qweight[start // 32 * self.bits : stop // 32 * self.bits]
        if self._group:
            part = slice(start // self._group, stop // self._group)
            return dequantize_groups(words, self.zeros[part], self.scales[part], self.bits)
        return dequantize_rows(words, self.zeros, self.scales, self.groups[start:stop], self.bits)
