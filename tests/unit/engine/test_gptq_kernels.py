"""gptqmodel, the program, as the judge of the layout and as a provider of layers. Skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from koala_local.convert.gptq.checkpoint import quantize_gptq
from koala_local.convert.gptq.matrix import GptqSettings
from koala_local.convert.gptq.pack import pack
from koala_local.convert.sources.checkpoint import open_checkpoint

from koala_local.engine.gptq_files import TensorFiles, read_layout, read_model_settings
from koala_local.engine.gptq_kernels import Kernels, Unfit, installed
from koala_local.engine.gptq_layout import Layout
from koala_local.engine.gptq_linear import Placement, QuantizedLinear
from koala_local.engine.gptq_model import build_model
from tests.checkpoint_maker import make_hf
from tests.gptq_maker import random_matrix

pytestmark = pytest.mark.skipif(not installed(), reason="gptqmodel is not installed")

HALF = Placement("cpu", torch.float16)  # its plain kernel has 16-bit types only
IDS = [1, *range(20, 60)]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes and changes nothing
        yield


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return found.float()


def built(folder: Path, kernels: bool) -> torch.Tensor:
    layout = read_layout(folder)
    made = Kernels(layout, HALF, "gptq_torch") if kernels else None
    return logits(build_model(read_model_settings(folder), layout, TensorFiles(folder), HALF, made))


@pytest.mark.parametrize(("bits", "size"), [(4, 128), (4, 32), (4, -1), (3, 64), (2, 64), (8, 128)])
def test_gptqmodel_reads_what_is_written_here(tmp_path: Path, bits: int, size: int) -> None:
    from gptqmodel import BACKEND, GPTQModel

    source = make_hf(tmp_path / "source", hidden=256, kv_heads=2, dtype=torch.float16, extra_rows=12)
    out = tmp_path / "out"
    batches = [torch.randint(3, 340, (1, 96), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    quantize_gptq(open_checkpoint(source), batches, out, GptqSettings(bits, size))
    theirs = logits(GPTQModel.load(str(out), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model)
    for ours in (built(out, kernels=False), built(out, kernels=True)):
        assert (ours - theirs).abs().max() < 0.01 * theirs.std()


def layer_of(bits: int, size: int, any_order: bool) -> tuple[Kernels, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    parts = pack(random_matrix(64, 128, bits, size, any_order=any_order), bits)
    return Kernels(Layout(bits, size), HALF, "gptq_torch"), parts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_zeros_and_orders_of_2023(bits: int) -> None:
    kernels, parts = layer_of(bits, 32, any_order=True)
    with pytest.raises(Unfit, match="zero points"):  # some are 2^bits, which wraps around in gptqmodel
        kernels.layer(parts)
    parts["qzeros"] &= {2: 0x55555555, 3: 0, 4: 0x33333333, 8: 0x33333333}[bits]
    layer = torch.nn.ModuleList([kernels.layer(parts)])
    kernels.finish(layer)
    x = torch.randn(3, 128).half()
    own = QuantizedLinear(Layout(bits, 32), parts, HALF)(x)
    assert (layer[0](x) - own).abs().max() < 0.01 * own.std()


def test_a_layer_that_computes_something_else_is_not_used() -> None:
    kernels, parts = layer_of(4, 32, any_order=False)
    layer = torch.nn.ModuleList([kernels.layer(parts)])
    parts["scales"] = parts["scales"] * 1.1
    with pytest.raises(Unfit, match="off by"):
        kernels.finish(layer)


def test_what_it_cannot_run_is_said() -> None:
    kernels, parts = layer_of(4, 32, any_order=False)
    parts["g_idx"][:] = 0
    with pytest.raises(Unfit, match="unequal"):
        kernels.layer(parts)
    with pytest.raises(Unfit, match="no layer for"):
        Kernels(Layout(4, 32), HALF, "gptq_marlin").layer(layer_of(4, 32, any_order=False)[1])
