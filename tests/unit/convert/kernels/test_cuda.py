"""The kernels as Triton gets them, without a GPU: what its interpreter computes, what its compiler makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from koala_local.convert.kernels import choice, ggml

from tests.unit.convert.kernels.test_kernels import CLASSES, PER_MODE, importances

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("all_cores")

GPU = "cuda", 86, 32  # of Nvidia, compute capability 8.6, threads of a warp
# Each search but that of IQ4_XS, which takes long in the interpreter, in one of its uses.
INTERPRETED = ("Q4_K", True), ("Q3_K", False), ("Q6_K", False), ("Q8_0", False)


def weights_of_many_sorts() -> Any:
    """1024 super-blocks: as in models, of the sample's sorts, and of every adversarial class."""
    random = np.random.default_rng(7)
    parts = [choice.sample(16, 4096).reshape(-1, 256)]
    with np.errstate(all="ignore"):
        parts += [make(random, random.standard_normal((4, 256), np.float32)) for make in CLASSES.values()]
    known = np.concatenate(parts).astype(np.float32)
    return np.concatenate([known, random.standard_normal((1024 - len(known), 256), np.float32) * np.float32(0.02)])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the interpreter makes of the weights, by type and mode: packed bytes, and which are left to ggml."""
    folder = tmp_path_factory.mktemp("interpreted")
    np.save(folder / "weights.npy", weights_of_many_sorts())
    np.save(folder / "more.npy", np.resize(weights_of_many_sorts(), (3100, 256)))  # several launches, the last not full
    np.save(folder / "importance.npy", importances(512))

    def run(mode: tuple[str, bool]) -> Any:
        importance, output = folder / "importance.npy" if mode[1] else "-", folder / f"{mode}.npz"
        arguments = mode[0], folder / ("more.npy" if mode[0] == "Q8_0" else "weights.npy"), importance, output
        command = [sys.executable, "-m", "tests.unit.convert.kernels.interpreted", *map(str, arguments)]
        subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=280)
        return np.load(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(INTERPRETED, pool.map(run, INTERPRETED), strict=True))


@pytest.mark.parametrize(("type_", "weighted"), INTERPRETED)
def test_what_triton_computes_has_ggmls_bytes(type_: str, weighted: bool, interpreted: Any) -> None:
    found = interpreted[type_, weighted]
    blocks = np.resize(weights_of_many_sorts(), (len(found["packed"]), 256))
    expected = ggml.pack(blocks.reshape(-1, 512), type_, importances(512) if weighted else None)
    own = ~found["irregular"]
    assert own[624:1024].all() and own.sum() > 500
    assert (found["packed"][own] == expected.reshape(len(blocks), -1)[own]).all()


@PER_MODE
def test_the_compiled_kernel_neither_fuses_nor_approximates(
    type_: str, weighted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from koala_local.convert.kernels import cuda

    names = "x", "importance", "packed", "irregular", "scratch"
    types = dict(zip(names, ("*fp32", "*fp32" if weighted else "constexpr", "*i16", "*i8", "*fp32"), strict=True))
    source = triton.compiler.ASTSource(
        triton.jit(cuda.translated().KERNELS[type_]), types, {} if weighted else {"importance": None}
    )
    target = triton.backends.compiler.GPUTarget(*GPU)
    compiled = triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": False})

    instructions = set(
        re.findall(r"\b((?:fma|add|sub|mul|div|rcp|sqrt|rsqrt)\.[\w.]*f(?:16|32|64))\b", compiled.asm["ptx"])
    )
    assert instructions <= {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "sqrt")}
    assert "div.rn.f32" in instructions
    assert ".ftz" not in compiled.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@PER_MODE
def test_a_card_gives_ggmls_bytes(type_: str, weighted: bool) -> None:
    found, importance = choice.kernel(type_, weighted), importances(768) if weighted else None
    assert type_ == "Q8_0" or found.note.startswith("own kernel on the "), found.note
    blocks = np.resize(weights_of_many_sorts(), (9000, 768))
    expected = ggml.pack(blocks, type_, importance)
    with ThreadPoolExecutor(4) as pool:
        for packed in pool.map(lambda _: found.pack(blocks, type_, importance), range(8)):
            assert (packed == expected).all()
