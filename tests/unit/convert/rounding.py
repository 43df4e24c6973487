"""The plainest way to quantize, to compare with."""

from __future__ import annotations

import torch


def nearest(weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Each weight to the nearest code, groups of `size` scaled by their largest."""
    top, zero = (1 << bits) - 1, 1 << (bits - 1)
    groups = weight.view(len(weight), -1, size)
    scale = (2 * groups.abs().amax(-1, keepdim=True) / top).half().float()
    return (((groups / scale).round() + zero).clamp(0, top) - zero).mul(scale).view_as(weight)
