"""The plan before a run, held against published throughput, against what autograd keeps, and against a process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from koala_local.finetune.memory import block_activations, memory_of
from koala_local.finetune.model import build, inputs_of, shape_config
from koala_local.finetune.plan import Machine, Work, cost_on, plan_run
from koala_local.finetune.settings import LoraSettings, Settings
from koala_local.finetune.throughput import (
    A100,
    H100,
    RTX_4090,
    Numbers,
    known_gpu,
    tokens_per_second,
    utilization,
    work_per_token,
)

from tests.unit.finetune.tiny import CPU, SHAPE, VOCABULARY, batch

LLAMA_7B = Numbers(32_000, 4096, 11_008, 32, 32, 32, 128)
LLAMA_13B = Numbers(32_000, 5120, 13_824, 40, 40, 40, 128)
LLAMA_3_8B = Numbers(128_256, 4096, 14_336, 32, 32, 8, 128)
MPT_7B = Numbers(50_432, 4096, 4 * 4096 * 2 // 3, 32, 32, 32, 128, tied=True)  # two matrices of 4 x, as three
MPT_13B = Numbers(50_432, 5120, 4 * 5120 * 2 // 3, 40, 40, 40, 128, tied=True)


def test_sizes_and_work_are_those_of_the_models() -> None:
    assert (LLAMA_7B.parameters, LLAMA_13B.parameters) == (6_738_415_616, 13_015_864_320)
    assert LLAMA_3_8B.parameters == 8_030_261_248
    assert work_per_token(LLAMA_7B, 2048) == pytest.approx(43.65e9, rel=1e-3)
    assert work_per_token(LLAMA_13B, 2048) == pytest.approx(83.13e9, rel=1e-3)


@pytest.mark.parametrize(
    ("numbers", "gpu", "sequence", "mfu", "published"),
    [
        (MPT_7B, A100, 2048, 0.642, 4641),
        (MPT_13B, A100, 2048, 0.596, 2262),
        (MPT_7B, H100, 2048, 0.464, 10_643),
        (MPT_13B, H100, 2048, 0.398, 4792),
        (LLAMA_7B, A100, 2048, 0.57, 3760),
        (LLAMA_7B, A100, 4096, 0.57, 3760),
        (LLAMA_7B, A100, 2048, 0.50, 28.6e3 / 8),
        (LLAMA_13B, A100, 2048, 0.50, 15.0e3 / 8),
    ],
)
def test_published_throughput_follows_from_its_utilization(
    numbers: Numbers, gpu: Any, sequence: int, mfu: float, published: float
) -> None:
    work = work_per_token(numbers, sequence)
    assert tokens_per_second(gpu.peak, mfu, work) == pytest.approx(published, rel=0.1)
    assert utilization(published * 8, work, gpu.peak, gpus=8) == pytest.approx(mfu, rel=0.1)


def test_koala_took_six_hours() -> None:
    work = Work.of(rows=158_203, tokens=324_000_000 * 99 // 100, settings=Settings())
    plan = plan_run(LLAMA_13B, Settings(), work, Machine(8, A100.memory, A100))
    on_a100 = plan.costs[0]
    assert on_a100.hours == pytest.approx(6.0, rel=0.01)
    assert on_a100.tokens_per_second == pytest.approx(15.0e3, rel=0.01)
    assert max(on_a100.dollars) < 100
    assert plan.best.fits and plan.best.remedies == ()
    assert any("6 h on 8 A100" in line and "324M tokens" in line for line in plan.lines())


def test_state_is_sixteen_bytes_a_parameter_over_the_gpus() -> None:
    for numbers, published in ((LLAMA_7B, 13.5e9), (LLAMA_13B, 26e9)):
        memory = memory_of(numbers, Settings(), gpus=8)
        assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(published, rel=0.01)


def test_eight_bit_states_and_adapters_take_what_they_are_made_of() -> None:
    full = memory_of(LLAMA_7B, Settings(), gpus=1)
    eight_bit = memory_of(LLAMA_7B, Settings(optimizer="adamw8bit"), gpus=1)
    assert full.optimizer / eight_bit.optimizer == pytest.approx(4 / 1.016, rel=0.01)
    lora, qlora = (Settings(lora=LoraSettings(four_bit=four)) for four in (False, True))
    assert memory_of(LLAMA_7B, lora, gpus=1).weights == pytest.approx(2 * 6.74e9 + 4 * 160e6, rel=0.01)
    assert memory_of(LLAMA_7B, qlora, gpus=1).weights == pytest.approx(
        0.516 * 6.476e9 + 2 * 262e6 + 4 * 160e6, rel=0.01
    )
    whole = memory_of(LLAMA_7B, qlora, gpus=8).weights
    assert whole > 0.516 * 6.476e9, "what is in 4 bits is whole on every rank"


def test_a_13b_qlora_step_is_planned_within_24_gb() -> None:
    settings = Settings(lora=LoraSettings(four_bit=True), recompute="full")
    assert memory_of(LLAMA_13B, settings, gpus=1).peak < RTX_4090.memory


@pytest.mark.parametrize(
    ("numbers", "settings", "gpus", "memory", "remedies"),
    [
        (LLAMA_13B, Settings(micro_batch=4, recompute="none"), 8, 80e9, ["micro_batch=1"]),
        (LLAMA_7B, Settings(recompute="none"), 8, 30e9, ["recompute=full"]),
        (LLAMA_7B, Settings(recompute="full"), 1, 80e9, ["optimizer=adamw8bit"]),
        (LLAMA_13B, Settings(), 1, 24e9, ["--gpus 16 recompute=full", "--qlora recompute=full"]),
        (LLAMA_13B, Settings(global_batch=1), 1, 80e9, ["--lora", "--qlora"]),
        (LLAMA_13B, Settings(global_batch=1), 1, 4e9, []),
    ],
)
def test_what_would_make_it_fit(
    numbers: Numbers, settings: Settings, gpus: int, memory: float, remedies: list[str]
) -> None:
    plan = plan_run(numbers, settings, Work.of(1000, 2_000_000, settings), Machine(gpus, memory))
    assert not plan.best.fits
    assert list(plan.best.remedies) == remedies
    text = str(plan)
    assert "DOES NOT FIT" in text and all(f"would fit: {remedy}" in text for remedy in remedies)


def test_steps_end_where_max_steps_says_and_padding_takes_time() -> None:
    settings = Settings(global_batch=8, max_steps=10)
    work = Work.of(1000, 1000 * 1024, settings)
    assert (work.rows, work.steps, work.tokens, work.fill(2048)) == (80, 10, 80 * 1024, 0.5)
    assert Work.of(1001, 5, Settings(global_batch=8)).steps == 126
    cost = cost_on(A100, LLAMA_7B, settings, work, 1)
    assert cost.hours * 3600 * cost.tokens_per_second == pytest.approx(80 * 2048)


def test_gpus_that_are_not_here_are_planned_for_by_kind() -> None:
    work = Work.of(1000, 2_000_000, Settings())
    plan = plan_run(LLAMA_13B, Settings(), work, Machine(8, None))
    assert {verdict.kind: verdict.fits for verdict in plan.verdicts} == {"A100": True, "H100": True, "4090": False}
    assert plan.best.fits and plan.verdicts[2].remedies[-1] == "--qlora"
    text = str(plan)
    assert "\nfits on A100: " in text and "\nDOES NOT FIT on 4090: " in text and "of 24.0 GB" in text
    assert not plan_run(LLAMA_13B, Settings(), work, Machine(1, None)).best.fits


def test_recomputing_everything_costs_a_third_more_time_and_frees_memory() -> None:
    work = Work.of(1000, 2_000_000, Settings())
    selective, full = (cost_on(A100, LLAMA_7B, Settings(recompute=mode), work, 8) for mode in ("selective", "full"))
    assert full.hours == pytest.approx(selective.hours * 4 / 3)
    assert full.memory.peak < selective.memory.peak


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA A100 80GB PCIe", A100),
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", RTX_4090),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_known_by_its_name(name: str, gpu: Any) -> None:
    assert known_gpu(name) == gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_what_a_block_keeps_is_what_autograd_keeps(dtype: Any, kv_heads: int) -> None:
    base = replace(SHAPE, hidden_size=256, feed_forward_size=640, heads=8, kv_heads=kv_heads)

    def kept(layers: int) -> float:
        settings = Settings(
            model=replace(base, layers=layers), recompute="none", master_dtype=dtype, compute_dtype=dtype
        )
        assert settings.model
        trainee = build(shape_config(settings.model, VOCABULARY), None, settings, device=CPU, mesh=None)
        weights = {weight.untyped_storage().data_ptr() for weight in trainee.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes.update({} if storage.data_ptr() in weights else {storage.data_ptr(): storage.nbytes()})
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = trainee(inputs_of(batch([[128]], length=128), CPU))
        assert loss.requires_grad
        return sum(sizes.values()) / 128

    numbers = Numbers.of_shape(base, VOCABULARY)
    planned = block_activations(numbers, Settings(), 4 if dtype == "float32" else 2)
    assert planned == pytest.approx(kept(2) - kept(1), rel=0.03)


_MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np
import torch
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.memory import memory_of
from koala_local.finetune.model import build, inputs_of, shape_config
from koala_local.finetune.optimizer import build_optimizer, clip_gradients
from koala_local.finetune.settings import ModelShape, Settings
from koala_local.finetune.throughput import Numbers

torch.set_num_threads(1)
CPU = torch.device("cpu")

def train(settings, vocabulary):
    trainee = build(shape_config(settings.model, vocabulary), None, settings, device=CPU, mesh=None)
    optimizer = build_optimizer(trainee, settings)
    shape = (settings.micro_batch, settings.sequence_length)
    ids = np.random.default_rng(0).integers(0, vocabulary, shape)
    positions, documents = np.tile(np.arange(shape[1]), (shape[0], 1)), np.zeros(shape, np.int32)
    batch = Batch(ids, ids, np.ones(shape, np.float32), positions, documents)
    for _ in range(2):
        for _ in range(settings.global_batch // settings.micro_batch):
            trainee(inputs_of(batch, CPU)).backward()
        clip_gradients(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

mode, micro, total, length = sys.argv[1], *map(int, sys.argv[2:])
tiny = ModelShape(64, 128, 1, 2, 2, 64)
train(Settings(model=tiny, sequence_length=64, global_batch=1, recompute=mode), 100)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
shape = ModelShape(512, 1408, 8, 8, 8, length)
settings = Settings(model=shape, sequence_length=length, micro_batch=micro, global_batch=total, recompute=mode)
train(settings, 16_000)
planned = memory_of(Numbers.of_shape(shape, 16_000), settings, gpus=0, device="cpu")
state = planned.weights + planned.gradients + planned.optimizer
print(json.dumps({"measured": resident("VmHWM") - before, "planned": planned.peak, "state": state}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("case", ["selective 2 4 64", "none 2 4 64"])
def test_the_peak_of_a_process_is_the_planned_one(case: str) -> None:
    command = [sys.executable, "-c", _MEASURE, *case.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"] > 500e6
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1), found
