"""Kernels against ggml's own function, byte by byte, and what happens where there is none.

The installed library is the reference: where it was built with fused multiplication the kernels are not used, and these
tests say so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from koala_local.convert import kernels
from koala_local.convert.gguf.kquants import quantize_rows
from koala_local.convert.gguf.write import write_gguf
from koala_local.convert.kernels import choice, ggml
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.vocabulary.read import read_vocabulary

from koala_local.errors import ModelFileError
from tests.checkpoint_maker import make_hf
from tests.unit.convert.llama_quantize import llama_quantize, read_tensors

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("all_cores")

Array = Any
COLUMNS = 4096
GAUSSIANS = 20_000_000  # of each type, with and without importance matrix
MODES = [(type_, weighted) for type_ in choice.TYPES for weighted in (False, True)]
PER_MODE = pytest.mark.parametrize(
    ("type_", "weighted"), MODES, ids=[f"{type_}-{'imatrix' if weighted else 'plain'}" for type_, weighted in MODES]
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all tests here: what is compiled is kept in its cache."""
    return tmp_path_factory.mktemp("kernels-home")


@pytest.fixture(autouse=True)
def one_home(koala_home: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOALA_HOME", str(home))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # test_cuda.py is for those


@pytest.fixture
def fresh() -> Any:
    """Nothing is remembered of kernels compiled before, nor afterwards of those in the test."""
    caches = choice.kernel, choice._compiled
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def own(type_: str, weighted: bool) -> choice.Pack:
    found = choice.kernel(type_, weighted)
    assert found.note.startswith("own kernel"), found.note
    return found.pack


def importances(columns: int = COLUMNS) -> Array:
    """As in a matrix: squares over several orders of magnitude, some of them zero."""
    random = np.random.default_rng(2)
    vector = random.standard_normal(columns, np.float32) ** 2 * np.exp(random.standard_normal(columns, np.float32))
    vector[random.random(columns) < 0.01] = 0
    return vector.astype(np.float32)


def differing(rows: Array, type_: str, importance: Array | None) -> int:
    """How many super-blocks differ from ggml's, of at least as many as the kernel takes at a time."""
    rows = np.resize(rows, (max(len(rows), 64 * 256 // rows.shape[1]), rows.shape[1]))
    blocks = rows.size // 256
    ours = own(type_, importance is not None)(rows, type_, importance).reshape(blocks, -1)
    return int((ours != ggml.pack(rows, type_, importance).reshape(blocks, -1)).any(1).sum())


@PER_MODE
def test_gaussian_weights_have_ggmls_bytes(type_: str, weighted: bool) -> None:
    rows, importance = 512, importances() if weighted else None
    own(type_, weighted)  # compiled before threads ask for it

    def differing_of(seed: int) -> int:
        weights = np.random.default_rng(seed).standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)
        return differing(weights, type_, importance)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert sum(pool.map(differing_of, range(-(-GAUSSIANS // (rows * COLUMNS))))) == 0


def one_in(share: float, shape: tuple[int, int], random: np.random.Generator) -> Array:
    return random.random(shape) < share


Make = Callable[[np.random.Generator, Array], Array]  # from Gaussian weights
CLASSES: dict[str, Make] = {
    "zeros": lambda r, x: x * 0,
    "negative zeros": lambda r, x: x * 0 * -1 - 0.0,
    "some rows zero": lambda r, x: x * (np.arange(len(x)) % 2)[:, None],
    "some blocks zero": lambda r, x: x * np.repeat(r.random((len(x), x.shape[1] // 16)) < 0.5, 16, axis=1),
    "constant": lambda r, x: x * 0 + 0.37,
    "negative constant": lambda r, x: x * 0 - 0.37,
    "constant blocks": lambda r, x: np.repeat(x[:, ::16], 16, axis=1),
    "constant but for one": lambda r, x: np.where(np.arange(x.shape[1]) % 256 == 7, x, 0.5),
    "positive": lambda r, x: np.abs(x),
    "negative": lambda r, x: -np.abs(x),
    "far from zero": lambda r, x: 1000 + x * 0.001,
    "far below zero": lambda r, x: -1000 + x * 0.001,
    "hardly above the smallest scale": lambda r, x: x * 1e-15,
    "denormal": lambda r, x: x * 1e-40,
    "the smallest denormals": lambda r, x: np.round(x) * 1.4e-45,
    "squares underflow": lambda r, x: x * 1e-23,
    "squares overflow": lambda r, x: x * 1e19,
    "sums of squares overflow": lambda r, x: x * 1e18,
    "huge": lambda r, x: np.clip(x, -3, 3) * 1e38,
    "scales beyond float16": lambda r, x: x * 1e7,
    "scales below float16": lambda r, x: x * 1e-7,
    "all magnitudes by block": lambda r, x: x * 10.0 ** r.integers(-44, 38, (len(x), x.shape[1] // 32)).repeat(32, 1),
    "all magnitudes by weight": lambda r, x: x * 10.0 ** r.integers(-44, 38, x.shape),
    "one outlier": lambda r, x: np.where(np.arange(x.shape[1]) % 256 == 100, x * 1e4, x),
    "one huge outlier": lambda r, x: np.where(np.arange(x.shape[1]) % 256 == 100, x * 1e30, x),
    "sparse": lambda r, x: x * one_in(0.02, x.shape, r),
    "one of a block": lambda r, x: x * (np.arange(x.shape[1]) % 32 == 5),
    "heavy tails": lambda r, x: x**9,
    "bfloat16": lambda r, x: (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32),
    "float16": lambda r, x: x.astype(np.float16),
    "halves": lambda r, x: np.round(x * 4) / 8,
    "ties": lambda r, x: r.integers(-16, 16, x.shape) + 0.5,
    "levels of four bits": lambda r, x: r.integers(-8, 8, x.shape),
    "signs": lambda r, x: np.sign(x),
    "ascending": lambda r, x: np.broadcast_to(np.arange(x.shape[1]) % 256 - 128, x.shape),
    "infinite": lambda r, x: np.where(one_in(0.001, x.shape, r), np.inf * np.sign(x), x),
    "all infinite": lambda r, x: np.inf * np.sign(x),
    "infinite and zero": lambda r, x: np.where(one_in(0.01, x.shape, r), np.inf, 0),
}  # fmt: skip


def made(name: str, shape: tuple[int, int] = (16, 2048)) -> Array:
    random = np.random.default_rng(4)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(CLASSES[name](random, random.standard_normal(shape)), dtype=np.float32)
    assert not np.isnan(values).any()
    return values


@PER_MODE
def test_odd_weights_have_ggmls_bytes(type_: str, weighted: bool) -> None:
    importance = importances(2048) if weighted else None
    found = {name: differing(made(name), type_, importance) for name in CLASSES}
    assert not {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("importance", [np.zeros(2048), np.ones(2048), np.arange(2048) % 256 < 3], ids=str)
@pytest.mark.parametrize("type_", choice.TYPES)
def test_odd_importances_have_ggmls_bytes(type_: str, importance: Array) -> None:
    for name in ("positive", "sparse", "one huge outlier", "all magnitudes by block"):
        assert differing(made(name), type_, importance.astype(np.float32)) == 0


@pytest.mark.parametrize("type_", choice.TYPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 33, 65])
def test_any_number_of_rows(type_: str, rows: int) -> None:
    for columns in (256, 768):
        weights = np.random.default_rng(rows).standard_normal((rows, columns), np.float32)
        for importance in (None, importances(columns)):
            packed = own(type_, importance is not None)(weights, type_, importance)
            assert packed.tobytes() == ggml.pack(weights, type_, importance).tobytes()


SMALL = numpy_strategies.arrays(np.float32, 512, elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-15, 3e38]))


def finite(content: bytes) -> Array:
    """Any bits as numbers, but for infinities and NaN, which lose a bit of their exponent."""
    bits = np.frombuffer(content, np.uint32)
    return np.where(bits & 0x7F800000 == 0x7F800000, bits ^ 0x00800000, bits).astype(np.uint32).view(np.float32)


@given(
    weights=st.binary(min_size=2048, max_size=2048).map(finite) | SMALL,
    mode=st.sampled_from(MODES),
    importance=st.sampled_from([1e-30, 1.0, 1e30]),
)
@settings(max_examples=200)
@example(np.full(512, 1e-45, np.float32), ("Q4_K", True), 1.0)
def test_any_finite_weights_have_ggmls_bytes(weights: Array, mode: tuple[str, bool], importance: float) -> None:
    vector = np.full(256, importance, np.float32) if mode[1] else None
    assert differing(weights.reshape(2, 256), mode[0], vector) == 0


@PER_MODE
def test_weights_as_in_models_are_not_left_to_ggml(type_: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heavier tails than Gaussian weights, and some rows larger than others."""
    random = np.random.default_rng(6)
    rows = random.standard_t(8, (128, 1024)) * np.exp(random.standard_normal((128, 1)))
    weights, importance, pack = rows.astype(np.float32), importances(1024) if weighted else None, own(type_, weighted)
    expected = ggml.pack(weights, type_, importance)
    left = 0

    def counted(rows: Array, type_: str, importance: Array | None) -> Array:
        nonlocal left
        left += rows.size // 256
        return ggml_pack(rows, type_, importance)

    ggml_pack = ggml.pack
    monkeypatch.setattr(ggml, "pack", counted)
    assert (pack(weights, type_, importance) == expected).all()
    assert left <= 5  # of 512


def test_what_is_left_to_ggml_has_its_own_importances() -> None:
    weights = np.random.default_rng(7).standard_normal((64, 1024), np.float32)
    weights[::3, 512:768] = 0
    weights[5::7, :256] = 0.25
    weights[11, 768:] *= np.float32(1e30)
    for type_ in choice.TYPES:
        assert differing(weights, type_, importances(1024)) == 0


def test_nan_is_refused_by_name() -> None:
    rows = made("sparse")
    rows[3, 5] = np.nan
    with pytest.raises(ModelFileError, match="ffn_up"):
        quantize_rows(rows, "Q4_K", name="blk.0.ffn_up", pack=own("Q4_K", False))


def test_threads_do_not_disturb_each_other() -> None:
    parts = [np.random.default_rng(seed).standard_normal((64, 1024), np.float32) for seed in range(8)]
    pack = own("Q4_K", False)
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(lambda part: pack(part, "Q4_K", None), parts))
    assert all((ours == ggml.pack(part, "Q4_K", None)).all() for ours, part in zip(packed, parts, strict=True))


@PER_MODE
def test_nothing_is_held_after_packing(type_: str, weighted: bool) -> None:
    """A leak would keep the whole model."""
    rows, importance = np.ones((64, COLUMNS), np.float32), importances() if weighted else None
    before = sys.getrefcount(rows)
    own(type_, weighted)(rows, type_, importance)
    assert sys.getrefcount(rows) == before


@PER_MODE
def test_nothing_is_fused(type_: str, weighted: bool) -> None:
    own(type_, weighted)
    code = "".join(choice._compiled(type_, weighted).inspect_asm().values())  # type: ignore[attr-defined]
    assert ("sqrt" in code) == (type_ in ("Q4_K", "Q5_K") or (weighted and type_ not in ("Q6_K", "Q8_0")))
    assert not [name for name in ("vfmadd", "vfmsub", "vfnmadd", "vfnmsub", "fmla", "fmls", "fmadd") if name in code]


def test_q3_k_runs_in_half_the_lanes() -> None:
    narrow, wide = (
        int(re.findall(r"(\d+) lanes", choice.kernel("Q3_K", weighted).note)[0]) for weighted in (False, True)
    )
    assert wide == 2 * narrow


# which function is used


@pytest.mark.parametrize("type_", ["Q3_K", "Q6_K"])
def test_a_compiled_kernel_is_kept(type_: str, home: Path) -> None:
    own(type_, False)
    program = (
        "from koala_local.convert.kernels import choice\n"
        f"assert choice.kernel('{type_}', False).note.startswith('own'), choice.kernel('{type_}', False).note\n"
        f"raise SystemExit(40 + len(choice._compiled('{type_}', False).stats.cache_hits))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "KOALA_HOME": str(home)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 41


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KOALA_HOME", str(tmp_path / "file"))
    config = SimpleNamespace(CACHE_DIR="before")
    with choice._numba_cache(config, "Q4_K") as cached:
        assert not cached
    assert config.CACHE_DIR == "before"


def test_without_numba_ggml_does_the_work(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    found = choice.kernel("Q4_K", False)
    assert found.pack is ggml.pack and "numba is not installed" in found.note


def test_without_a_working_gpu_the_processor_does_the_work(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("cuda", "threads"):  # imported by another test
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    note = choice.kernel("Q6_K", False).note
    assert note.startswith("own kernel with ") and note.endswith("; not on the GPU: triton is not installed")
    assert "GPU" not in choice.kernel("Q8_0", False).note  # it has no search


def test_what_the_card_has_no_memory_for_is_ggmls(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    room = [True]  # for the sample alone

    def card(blocks: Array, importance: Array) -> Any:
        if not room:
            raise torch.OutOfMemoryError
        room.clear()
        rows = blocks.reshape(-1, importance.size)
        return ggml.pack(rows, "Q6_K", importance).reshape(len(blocks), -1), np.zeros(len(blocks), np.bool_)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setitem(sys.modules, "koala_local.convert.kernels.cuda", SimpleNamespace(compiled=lambda *_: card))
    monkeypatch.setattr(kernels, "cuda", SimpleNamespace(compiled=lambda *_: card), raising=False)
    found, rows = choice.kernel("Q6_K", True), choice.sample(16, COLUMNS)
    assert found.note.startswith("own kernel on the Card")
    assert (found.pack(rows, "Q6_K", importances()) == ggml.pack(rows, "Q6_K", importances())).all()
    choice.kernel.cache_clear()
    assert "with" in (note := choice.kernel("Q6_K", True).note) and "; not on the GPU: no kernel:" in note


def test_where_bytes_differ_ggml_does_the_work(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """As with a library whose compiler fused multiplications: a few super-blocks are others."""
    pack = ggml.pack

    def fused(rows: Array, type_: str, importance: Array | None) -> Array:
        packed = pack(rows, type_, importance)
        packed[1000] ^= rows.shape[1] > 256  # not where a kernel leaves it a super-block
        return packed

    monkeypatch.setattr(ggml, "pack", fused)
    found = choice.kernel("Q6_K", True)
    assert found.pack is fused and "differ in 1 of 256" in found.note


def test_few_weights_are_not_worth_compiling() -> None:
    found = choice.choose_kernels({("Q4_K", False): 1000, ("Q4_0", False): 10**9})
    assert found.keys() == {("Q4_K", False)} and found["Q4_K", False].pack is ggml.pack
    assert "fewer than" in choice.notes_of(found)[0]


def test_a_whole_model_has_llama_cpps_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "WORTHWHILE", 0)
    folder = make_hf(tmp_path / "model", layers=4, hidden=256, feed_forward=512)
    source = open_checkpoint(folder)
    vocabulary = read_vocabulary(folder, source.config)
    write_gguf(source, vocabulary, tmp_path / "f32.gguf", "F32")
    for kind in ("Q4_K_M", "Q3_K_M", "Q2_K"):
        report = write_gguf(source, vocabulary, tmp_path / "ours.gguf", kind, threads=2, force=True)
        theirs = llama_quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", kind)
        assert read_tensors(tmp_path / "ours.gguf") == read_tensors(theirs)
        assert len(report.kernels) >= 2 and all(": own kernel with" in line for line in report.kernels)
