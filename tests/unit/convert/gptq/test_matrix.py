"""How well GPTQ rounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from koala_local.convert.gptq.matrix import GptqSettings, Hessian, inverse_factor, output_error, quantize_matrix

from koala_local.errors import ModelFileError
from tests.unit.convert.rounding import nearest

torch.set_num_threads(1)
SMALL = GptqSettings(bits=4, group_size=32)


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The algorithm as the paper has it, column by column from the left, scales of groups taken as they are reached."""
    weight, top, zero = weight.clone(), (1 << bits) - 1, 1 << (bits - 1)
    damped = hessian + torch.eye(len(hessian)) * 0.01 * hessian.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True).float()
    rounded = torch.zeros_like(weight)
    scale = torch.ones(len(weight))
    for column in range(weight.shape[1]):
        if column % size == 0:
            scale = (2 * weight[:, column : column + size].abs().amax(1) / top).half().float()
        codes = ((weight[:, column] / scale).round() + zero).clamp(0, top)
        rounded[:, column] = (codes - zero) * scale
        error = (weight[:, column] - rounded[:, column]) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
    return rounded


def correlated(inputs: int, seed: int, tokens: int = 1500) -> torch.Tensor:
    """Inputs of a layer, (tokens, inputs): half as many causes as columns, and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, inputs // 2, generator=generator) @ torch.randn(
        inputs // 2, inputs, generator=generator
    )
    sizes = 0.1 + 3 * torch.rand(inputs, generator=generator)
    return causes * sizes / math.sqrt(inputs) + 0.1 * torch.randn(tokens, inputs, generator=generator)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    for start in range(0, len(x), 400):
        hessian.add(x[start : start + 400])
    return hessian.mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("inputs", "size"), [(256, 64), (192, 32), (384, 128), (160, -1)])
def test_outputs_are_closer_than_the_plain_algorithms(bits: int, inputs: int, size: int) -> None:
    x = correlated(inputs, seed=inputs + bits)
    weight, hessian = torch.randn(48, inputs, generator=torch.Generator().manual_seed(bits)) * 0.02, mean_square(x)
    wide = inputs if size == -1 else size
    ours = quantize_matrix(weight, hessian, GptqSettings(bits, size))
    plain = output_error(weight, plain_gptq(weight, hessian, bits, wide), hessian)
    assert ours.error <= plain
    assert ours.error < 0.4 * output_error(weight, nearest(weight, bits, wide), hessian)


def test_the_error_is_that_of_the_outputs() -> None:
    x = correlated(128, seed=3)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    rounded = quantize_matrix(weight, mean_square(x), SMALL)
    wanted = x @ weight.T
    found = x @ rounded.matrix.dequantized().T
    assert rounded.error == pytest.approx(float((wanted - found).square().mean() / wanted.square().mean()), rel=1e-3)


def test_without_ordering_and_search_it_is_the_paper_s_algorithm() -> None:
    """Blocks and the other way to the inverse change nothing but the last bits. One group: scales are the same then."""
    x = correlated(320, seed=5)
    weight, hessian = torch.randn(16, 320, generator=torch.Generator().manual_seed(1)), mean_square(x)
    settings = GptqSettings(4, -1, activation_order=False, search_scales=False)
    ours = quantize_matrix(weight, hessian, settings).matrix.dequantized()
    assert (ours != plain_gptq(weight, hessian, 4, 320)).float().mean() < 0.01


def test_the_last_group_may_be_shorter() -> None:
    x = correlated(160, seed=7)
    weight = torch.randn(32, 160, generator=torch.Generator().manual_seed(1))
    matrix = quantize_matrix(weight, mean_square(x), GptqSettings(4, 128)).matrix
    assert matrix.scales.shape == (2, 32)
    assert matrix.groups.tolist() == [0] * 128 + [1] * 32


# Hessians that cannot be decomposed


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = mean_square(correlated(96, seed=1))
    factor, damping = inverse_factor(hessian, 0.01)
    damped = hessian + torch.eye(96) * 0.01 * hessian.diagonal().mean()
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(96), atol=1e-3)


def singular(kind: str) -> torch.Tensor:
    x = correlated(96, seed=2, tokens=400)
    if kind == "dead columns":
        x[:, ::3] = 0
    elif kind == "few tokens":
        x = x[:5]
    elif kind == "equal columns":
        x[:, 48:] = x[:, :48]
    elif kind == "no input":
        x = torch.zeros_like(x)
    return mean_square(x)


@pytest.mark.parametrize("kind", ["dead columns", "few tokens", "equal columns", "no input"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_is_damped(kind: str, damping: float) -> None:
    weight, hessian = torch.randn(32, 96, generator=torch.Generator().manual_seed(1)), singular(kind)
    rounded = quantize_matrix(weight, hessian, replace(SMALL, damping=damping))
    assert rounded.matrix.dequantized().isfinite().all()
    assert rounded.error <= output_error(weight, nearest(weight, 4, 32), hessian)
    assert (weight - rounded.matrix.dequantized()).abs().max() < 3  # an unseen column keeps weights of its size


def test_a_hessian_that_is_not_positive_raises_the_damping() -> None:
    """Rounding errors do this: one eigenvalue below zero by more than the damping asked for."""
    hessian = torch.eye(64) - 0.02 * torch.ones(64, 64)
    rounded = quantize_matrix(torch.randn(32, 64), hessian, SMALL)
    assert 0.01 < rounded.damping < 100
    assert rounded.matrix.dequantized().isfinite().all()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    weight[:, :32] = 0
    matrix = quantize_matrix(weight, torch.eye(64), SMALL).matrix
    assert (matrix.dequantized()[:, :32] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_no_numbers_are_refused(value: float) -> None:
    hessian = torch.eye(64)
    hessian[3, 3] = value
    with pytest.raises(ModelFileError):
        quantize_matrix(torch.randn(32, 64), hessian, SMALL)
