"""GPTQ (arXiv 2210.17323): integer codes for a matrix such that its outputs, not its entries, stay close.

Columns are rounded one after the other, and what rounding one does to the outputs is made up for by those that follow,
as the Hessian of the layer's inputs tells. Columns with large inputs come first (activation order), but keep the group
that they lie in (static groups), so that nothing in the file says in which order they were taken.

Beyond the paper: a group's scale is not its largest weight's but the one that rounds with the least weighted error,
with the weights that GPTQ itself gives to each column's error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from koala_local.errors import ModelFileError

from .pack import QuantizedMatrix

_COLUMNS = 128  # rounded before the rest of the matrix is updated
_DAMPING_STEPS = 8
_SHRINKS = 32  # scales tried
_LEAST = 0.5  # of the largest weight's scale
_SMALLEST_SCALE = 2.0**-24  # float16's


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """`group_size` -1: one group for all inputs. `damping` is a share of the Hessian's mean diagonal."""

    bits: int = 4
    group_size: int = 128
    activation_order: bool = True
    damping: float = 0.01
    search_scales: bool = True


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantized matrix; `error` is the mean squared output error over the mean squared output, `damping` what the
    Cholesky decomposition took in the end."""

    matrix: QuantizedMatrix
    error: float
    damping: float


class Hessian:
    """The mean of x xT over all inputs of a layer, float32 (columns, columns)."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(columns, columns, device=device)
        self.samples = 0

    def add(self, x: torch.Tensor) -> None:
        """`x` is (tokens, columns), of any type."""
        wide = x.float()
        self._sum.addmm_(wide.T, wide)
        self.samples += len(x)

    def mean(self) -> torch.Tensor:
        return self._sum / max(1, self.samples)


@torch.inference_mode()
def quantize_matrix(weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings) -> Rounded:
    """Codes for `weight` (outputs, inputs), whose inputs have the mean outer product `hessian` (inputs, inputs).
    Computes where the Hessian lies, in float32. Raises ModelFileError when either is not finite."""
    weight = weight.to(hessian.device, torch.float32)
    if not weight.isfinite().all() or not hessian.isfinite().all():
        raise ModelFileError("the weights or their inputs hold NaN or infinite values", "the checkpoint is damaged")
    order = _order(hessian, settings.activation_order)
    factor, damping = inverse_factor(hessian[order][:, order], settings.damping)
    importance = torch.empty_like(factor[0])
    importance[order] = factor.diagonal().square().reciprocal()
    groups = group_index(weight.shape[1], settings.group_size, weight.device)
    scales = _scales(weight, importance if settings.search_scales else None, settings)
    columns = weight.T[order].contiguous()  # (inputs, outputs): what is taken at once lies together
    taken = _round_columns(columns, factor, scales.float(), groups[order].tolist(), settings.bits)
    codes = torch.empty_like(taken)
    codes[order] = taken
    zeros = torch.full_like(scales, 1 << (settings.bits - 1), dtype=torch.int16)
    matrix = QuantizedMatrix(codes.T, zeros, scales, groups.to(torch.int32))
    return Rounded(matrix, output_error(weight, matrix.dequantized(), hessian), damping)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """The mean squared difference of the outputs over their mean square; 0 where there is no output."""
    difference = weight - rounded
    wrong, whole = (float(((m @ hessian) * m).sum(dtype=torch.float64)) for m in (difference, weight))
    return max(0.0, wrong) / whole if whole > 0 else 0.0


def group_index(inputs: int, group_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The group of each input, int64: i // group_size."""
    return torch.arange(inputs, device=device) // (inputs if group_size == -1 else group_size)


def _order(hessian: torch.Tensor, by_activation: bool) -> torch.Tensor:
    diagonal = hessian.diagonal()
    if by_activation:
        return diagonal.argsort(descending=True, stable=True)
    return torch.arange(len(diagonal), device=diagonal.device)


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The upper triangular U with UT U = inverse of the damped Hessian, and the damping used: where the decomposition
    fails, or loses so much precision that U is not finite, ten times more is tried, several times.

    U comes from one Cholesky decomposition from the far corner, H = R RT with R upper triangular: U = inverse of R."""
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(len(hessian), device=hessian.device)
    if mean <= 0:
        return identity, damping  # a layer that no input reached: nothing can be made up for
    for step in range(_DAMPING_STEPS):
        share = max(damping, 1e-6) * 10**step if step else damping
        damped = (hessian + identity * (share * mean)).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if factor.isfinite().all():
                return factor, share
    return identity, math.inf  # no decomposition at all: plain rounding


def _scales(weight: torch.Tensor, importance: torch.Tensor | None, settings: GptqSettings) -> torch.Tensor:
    """A symmetric scale for each group of each output: float16 (groups, outputs), never 0."""
    inputs = weight.shape[1]
    size = inputs if settings.group_size == -1 else settings.group_size
    padding = -inputs % size
    grouped = functional.pad(weight, (0, padding)).view(len(weight), -1, size)  # (outputs, groups, size)
    top, zero = (1 << settings.bits) - 1, 1 << (settings.bits - 1)
    largest = grouped.abs().amax(-1)
    full = 2 * largest / top
    if importance is None:
        return _as_float16(full, largest)
    costs = functional.pad(importance, (0, padding)).view(-1, size)
    best, lowest = full, torch.full_like(full, math.inf)
    for step in range(_SHRINKS):
        scale = _as_float16(full * (1 - (1 - _LEAST) * step / _SHRINKS), largest).float().T  # (outputs, groups)
        wide = scale[..., None]
        error = (grouped / wide).round_().clamp_(-zero, top - zero).mul_(wide).sub_(grouped).square_().mul_(costs)
        total = error.sum(-1)
        better = total < lowest
        best, lowest = torch.where(better, scale, best), torch.where(better, total, lowest)
    return _as_float16(best, largest)


def _as_float16(scale: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """(outputs, groups) to (groups, outputs); a group of nothing but zeros gets 1."""
    narrow = scale.clamp(_SMALLEST_SCALE, torch.finfo(torch.float16).max)
    return torch.where(largest > 0, narrow, torch.ones_like(narrow)).to(torch.float16).T.contiguous()


def _round_columns(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, groups: Sequence[int], bits: int
) -> torch.Tensor:
    """uint8 codes for `columns` (inputs, outputs), which are used up; `groups` names the row of `scales` of each."""
    codes = torch.empty_like(columns, dtype=torch.uint8)
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    for start in range(0, len(columns), _COLUMNS):
        stop = min(start + _COLUMNS, len(columns))
        block, triangle = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, scale = block[i], scales[groups[start + i]]
            code = (column / scale).round_().add_(zero).clamp_(0, top)
            codes[start + i] = code
            errors[i] = code.sub_(zero).mul_(scale).sub_(column).div_(-triangle[i, i])
            block[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
