"""llama.cpp's own samplers in a chain: penalties, top-k, top-p, min-p, temperature and the seeded draw run in C."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from koala_local.engine.bindings import ll
from koala_local.engine.sampling import Sampling


class LlamaSampler:
    """A chain of llama.cpp's own samplers, seeded. Satisfies `Sampler`."""

    def __init__(
        self, context: Any, vocabulary_size: int, sampling: Sampling, seed: int, before: Sequence[int]
    ) -> None:
        self._chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
        for stage in _stages(sampling, seed, vocabulary_size):
            ll.llama_sampler_chain_add(self._chain, stage)
        for token in before[-sampling.repeat_last_n :] if sampling.repeat_last_n else ():
            ll.llama_sampler_accept(self._chain, token)
        self.sample: Callable[[], int] = partial(ll.llama_sampler_sample, self._chain, context, -1)

    def close(self) -> None:
        ll.llama_sampler_free(self._chain)


def _stages(sampling: Sampling, seed: int, vocabulary_size: int) -> Iterator[Any]:
    """In llama.cpp's own order: penalties, top-k, top-p, min-p, temperature, draw."""
    if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n:
        yield ll.llama_sampler_init_penalties(
            vocabulary_size, sampling.repeat_last_n, sampling.repeat_penalty, 0.0, 0.0
        )
    if sampling.temperature == 0.0:
        yield ll.llama_sampler_init_greedy()
        return
    if sampling.top_k:
        yield ll.llama_sampler_init_top_k(sampling.top_k)
    if sampling.top_p < 1.0:
        yield ll.llama_sampler_init_top_p(sampling.top_p, 1)
    if sampling.min_p > 0.0:
        yield ll.llama_sampler_init_min_p(sampling.min_p, 1)
    yield ll.llama_sampler_init_temp(sampling.temperature)
    yield ll.llama_sampler_init_dist(seed & 0xFFFFFFFF)
