"""Which tokens the torch sampler may draw. llama.cpp's is the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from koala_local.engine.gptq_sampler import TorchSampler, candidates
from koala_local.engine.sampling import Sampling
from tests.engines import tiny_engine


def draws(logits: list[float], sampling: Sampling, before: list[int] | None = None, count: int = 300) -> set[int]:
    tensor = torch.tensor(logits)
    found = set()
    for seed in range(count):
        found.add(TorchSampler(lambda: tensor, sampling, seed, before or []).sample())
    return found


OPEN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0.0}, {1}),
        ({"top_k": 2}, {1, 0}),
        ({"top_p": 0.75}, {1, 0}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.25}, {1, 0, 3}),
    ],
)
def test_each_stage_keeps_the_tokens_that_it_should(change: dict[str, Any], kept: set[int]) -> None:
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log().tolist()
    assert draws(logits, Sampling(**{**vars_of(OPEN), **change})) == kept


def vars_of(sampling: Sampling) -> dict[str, Any]:
    return sampling._asdict()


def test_repetition_is_punished_for_the_last_tokens_only() -> None:
    greedy = Sampling(temperature=0.0, repeat_penalty=2.0, repeat_last_n=2)
    assert draws([1.0, 1.5, 0.0], greedy, [1], count=1) == {0}
    assert draws([1.0, 1.5, 0.0], greedy, [1, 2, 2], count=1) == {1}
    assert draws([-1.0, -1.5, -1.9], greedy, [0], count=1) == {1}
    sampler = TorchSampler(lambda: torch.tensor([1.0, 1.5, 0.9]), greedy, 0, [])
    assert [sampler.sample() for _ in range(3)] == [1, 0, 2]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5, top_p=0.5), Sampling(min_p=0.3, top_p=0.99)])
def test_the_candidates_are_llama_cpps(tmp_path: Path, sampling: Sampling) -> None:
    """What llama.cpp draws in many tries lies among our candidates, and likely ones among them are all drawn."""
    llama = tiny_engine(tmp_path, context=64)
    llama.evaluate([1, 20, 30], slot=0, position=0)
    values, tokens = candidates(torch.tensor(llama.logits()), sampling)
    drawn = set()
    for seed in range(300):
        sampler = llama.sampler(sampling, seed, [])
        drawn.add(sampler.sample())
        sampler.close()
    llama.close()
    chances = torch.softmax(values / sampling.temperature, 0)
    assert drawn <= set(tokens.tolist())
    assert {token for token, chance in zip(tokens.tolist(), chances, strict=True) if chance > 0.05} <= drawn
