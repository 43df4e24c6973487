from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as ll
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala_local.engine import llama
from koala_local.engine.llama import Placement
from koala_local.errors import ModelFileError
from koala_local.models.devices import Gpu, Machine, this_machine
from koala_local.models.gguf_header import GgufHeader, read_header
from koala_local.models.memory import Choice, Plan, Wish, estimate, fit, gpu_room, step_down
from koala_local.models.shape import Block, Shape, all_tensors, read_shape
from tests.gguf_maker import make_model

GB = 10**9
# Koala 13B in Q4_K_M: 7.87 GB, 40 layers, 5120 wide, 13824 feed-forward, no grouped KV.
KOALA = Shape(
    layers=(Block(189_000_000, Counter(Q4_K=150_000_000)),) * 40,
    input=Block(92_000_000),
    output=Block(134_000_000),
    embedding=5120,
    feed_forward=13824,
    vocabulary=32_000,
    kv_widths=((5120, 5120),) * 40,
    head_size=128,
    trained_context=2048,
)


def machine(gpu: float = 0.0, ram: float = 64.0) -> Machine:
    gpus = (Gpu("CUDA0", "a card", int(gpu * GB), int(gpu * GB)),) if gpu else ()
    return Machine(int(ram * GB), int(ram * GB), 0, gpus, frozenset({"Q4_K"}))


class Reports:
    """What llama.cpp says that it allocates."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._callback = ll.llama_log_callback(lambda level, text, data: self.lines.append(text.decode()))
        ll.llama_log_set(self._callback, ctypes.c_void_p())

    def mebibytes(self, what: str) -> float:
        found = re.findall(rf"{what} buffer size = +([\d.]+) MiB", "".join(self.lines))
        return float(found[-1]) if found else 0.0


def reported(path: Path, context: int, kv_type: str) -> Reports:
    """Load as the engine does."""
    reports = Reports()
    model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
    handle = ll.llama_init_from_model(model, llama._context_params(Placement(context, kv_type=kv_type)))
    assert handle
    ll.llama_free(handle)
    ll.llama_model_free(model)
    ll.llama_log_set(llama._keep_log, ctypes.c_void_p())
    return reports


@pytest.mark.parametrize(("context", "kv_type"), [(512, "f16"), (1000, "f16"), (2048, "q8_0"), (2048, "q4_0")])
@pytest.mark.parametrize("wide", [256, 512])
@pytest.mark.parametrize("plain", [False, True])
def test_the_parts_are_what_llama_cpp_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool, wide: int, context: int, kv_type: str
) -> None:
    monkeypatch.setattr(llama, "plain_attention", lambda: plain)
    path = make_model(tmp_path / "model.gguf", embedding=wide, heads=4, layers=3, feed_forward=3 * wide, context=4096)
    header = read_header(path)
    here = this_machine()._replace(plain_attention=plain)
    parts = estimate(read_shape(header, header.tensors), here, Choice(context, kv_type, 0))
    reports = reported(path, context, kv_type)
    assert parts.kv / 2**20 == pytest.approx(reports.mebibytes("KV"), abs=0.01)
    assert parts.weights / 2**20 == pytest.approx(reports.mebibytes("CPU_Mapped model"), abs=0.02)
    # quantized, the cache is turned before it is stored: another widest place, of up to a few MiB
    tolerance = 0.02 if kv_type == "f16" else 0.2
    assert parts.compute / 2**20 == pytest.approx(reports.mebibytes("compute"), rel=tolerance)


def test_the_logits_of_a_large_vocabulary_are_reserved_as_planned(tmp_path: Path) -> None:
    words = [(f"word{number}", int(gguf.TokenType.NORMAL)) for number in range(40_000)]
    path = make_model(tmp_path / "model.gguf", extra_tokens=words)
    header = read_header(path)
    shape = read_shape(header, header.tensors)
    on_gpu = estimate(shape, machine(gpu=24), Choice(512, "f16", shape.placeable))
    assert on_gpu.gpu_compute / 2**20 == pytest.approx(reported(path, 512, "f16").mebibytes("compute"), rel=0.02)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "Q2_K", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL"])
def test_reordered_weights_are_those_that_llama_cpp_reorders(tmp_path: Path, name: str) -> None:
    full, small = make_model(tmp_path / "full.gguf", embedding=256, feed_forward=512), tmp_path / "small.gguf"
    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{name}")
    assert ll.llama_model_quantize(os.fsencode(full), os.fsencode(small), params) == 0
    header = read_header(small)
    parts = estimate(read_shape(header, header.tensors), this_machine(), Choice(512, "f16", 0))
    assert parts.repacked / 2**20 == pytest.approx(reported(small, 512, "f16").mebibytes("CPU_REPACK model"), abs=0.01)


def test_without_flash_attention_the_scores_of_all_heads_grow_with_the_context() -> None:
    here = machine()._replace(plain_attention=True)
    short, long = (estimate(KOALA, here, Choice(context, "f16", 0)) for context in (2048, 4096))
    added = 256 * 2048  # tokens at once, more cells
    assert long.compute - short.compute == 40 * added * 4 + added * 4  # and the mask
    assert long.runtime - short.runtime == 40 * added * 2  # V is multiplied with them in 16 bits


def test_a_large_card_takes_all_of_it_unchanged() -> None:
    plan = fit(KOALA, machine(gpu=24), Wish())
    assert plan.choice == Choice(2048, "f16", 41)
    assert not plan.concessions and not plan.problem
    assert plan.parts.gpu_kv == 2048 * 2 * 40 * 5120 * 2
    assert plan.parts.gpu_weights == 40 * 189_000_000 + 134_000_000
    assert "all layers on the GPU; context 2048, KV cache f16" in str(plan)


def test_concessions_come_in_their_order() -> None:
    longer = KOALA._replace(trained_context=4096)
    sizes = [step / 10 for step in range(240, 10, -2)]
    plans = [fit(longer, machine(gpu=size), Wish()) for size in sizes]
    choices = [plan.choice for plan in plans]
    assert [choice.gpu_layers for choice in choices] == sorted((c.gpu_layers for c in choices), reverse=True)
    assert {choice.kv_type for choice in choices if choice.context < 4096} == {"q8_0"}
    assert {choice.context for choice in choices if choice.gpu_layers < 41} == {2048}
    seen = [len(plan.concessions) for plan in plans]
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3}
    for plan in plans:
        assert plan.parts.gpu <= gpu_room(plan.machine.gpus)


def test_a_8_gb_card_keeps_some_layers_of_13b_on_the_cpu() -> None:
    plan = fit(KOALA, machine(gpu=8), Wish())
    assert plan.choice.kv_type == "q8_0" and 30 <= plan.choice.gpu_layers < 41
    assert f"{plan.choice.gpu_layers} of 41 layers on the GPU" in str(plan)
    assert plan.parts.weights > 92_000_000


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        (Wish(context=8192), ("context", 8192)),
        (Wish(kv_type="f16"), ("kv_type", "f16")),
        (Wish(gpu_layers=41), ("gpu_layers", 41)),
        (Wish(gpu_layers=10), ("gpu_layers", 10)),
    ],
)
def test_what_the_user_sets_is_never_conceded(wish: Wish, kept: tuple[str, Any]) -> None:
    assert getattr(fit(KOALA, machine(gpu=8), wish).choice, kept[0]) == kept[1]


def test_more_layers_than_there_are_means_all() -> None:
    assert fit(KOALA, machine(gpu=24), Wish(gpu_layers=999)).choice.gpu_layers == 41
    assert fit(KOALA, machine(), Wish(gpu_layers=999)).choice.gpu_layers == 0


def test_ram_that_is_too_small_is_a_problem_with_a_remedy() -> None:
    plan = fit(KOALA, machine(ram=8), Wish())
    assert re.search(r"needs \S+ GB of RAM and 0\.27 GB to spare, and 8\.00 GB are free", plan.problem)
    assert "take a type of at most" in plan.hint
    assert plan.choice.kv_type == "q8_0"
    assert not plan.is_hopeless  # the weights can be read from the disk again and again
    assert fit(KOALA, machine(ram=4), Wish()).is_hopeless  # what must stay in RAM does not fit


def test_the_remedy_for_a_wish_that_is_too_large_is_computed() -> None:
    asked = fit(KOALA, machine(ram=12), Wish(context=16384, kv_type="f16"))
    assert asked.problem
    match = re.match(r"--context (\d+) --kv-type (\w+) would fit", asked.hint)
    assert match
    assert not fit(KOALA, machine(ram=12), Wish(int(match[1]), match[2])).problem


def test_unknown_memory_is_no_problem() -> None:
    assert not fit(KOALA, Machine(), Wish()).problem


def test_heads_that_have_no_whole_blocks_keep_f16() -> None:
    assert fit(KOALA._replace(head_size=80), machine(gpu=8), Wish()).choice.kv_type == "f16"


def test_stepping_down_ends_and_takes_less_each_time() -> None:
    for start in (fit(KOALA, machine(gpu=24), Wish()), fit(KOALA, machine(), Wish())):
        plans: list[Plan] = [start]
        while (smaller := step_down(plans[-1])) is not None:
            plans.append(smaller)
        assert 1 < len(plans) < 60
        needs = [plan.parts.gpu or plan.parts.anonymous for plan in plans]
        if start.choice.gpu_layers:
            needs = needs[:-1] if not plans[-1].choice.gpu_layers else needs
            assert plans[-1].choice.gpu_layers < 8
        assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
        assert plans[1].choice.kv_type == "q8_0"
    assert step_down(fit(KOALA, machine(gpu=24), Wish(2048, "f16", 41))) is None


@given(
    st.floats(0, 30),
    st.floats(0.1, 64),
    st.one_of(st.none(), st.integers(256, 1 << 20)),
    st.sampled_from(["auto", "f16", "q8_0", "q4_0"]),
    st.one_of(st.none(), st.integers(0, 999)),
)
def test_a_plan_without_a_problem_fits(
    gpu: float, ram: float, context: int | None, kv_type: str, layers: int | None
) -> None:
    here = machine(gpu, ram)
    plan = fit(KOALA, here, Wish(context, kv_type, layers))
    if not plan.problem:
        assert plan.parts.gpu <= gpu_room(here.gpus)
        assert plan.parts.ram <= (here.ram_available or 0)
    else:
        assert plan.hint


def header_of(path: Path, **metadata: Any) -> GgufHeader:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_uint64(f"llama.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


def test_a_header_that_lies_is_planned_by_its_tensors(tmp_path: Path) -> None:
    header = header_of(tmp_path / "liar.gguf", block_count=2**63, embedding_length=2**63, attention__head_count=2**63)
    shape = read_shape(header, header.tensors)
    assert shape.size == 0 and shape.is_estimate
    assert fit(shape, machine(), Wish()).parts.ram < 1 << 30


def test_the_parts_of_a_split_model_count_together(tmp_path: Path) -> None:
    first = read_header(make_model(tmp_path / "m-00001-of-00002.gguf"))
    second = read_header(make_model(tmp_path / "m-00002-of-00002.gguf", layers=1))
    assert all_tensors(first) == first.tensors  # its header does not say that it is split
    split = first._replace(metadata={**first.metadata, "split.count": 2})
    assert all_tensors(split) == first.tensors + second.tensors
    second.path.unlink()
    with pytest.raises(ModelFileError, match="does not exist"):
        all_tensors(split)
