"""What is measured against: a bare loop over llama.cpp's C functions, and the `Llama` class of llama-cpp-python."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as ll
from llama_cpp import Llama

from koala_local.engine.cores import physical_cores
from koala_local.engine.llama import _flash_attention
from koala_local.engine.sampling import Sampling

_SAMPLING = Sampling()
_BATCH = 512


class BareLoop:
    """Sample a token, decode it: nothing else. One sequence, no text, llama.cpp's default settings but for attention,
    which is computed as the engine does: what differs then is the program."""

    def __init__(self, path: Path, context: int, seed: int = 1) -> None:
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = physical_cores()
        params.flash_attn_type = _flash_attention("f16")
        self._context = ll.llama_init_from_model(self._model, params)
        self._chain = _chain(seed)
        self._token = (ll.llama_token * 1)()
        self._step = ll.llama_batch_get_one(self._token, 1)

    def read(self, ids: Sequence[int], keep: int = 0) -> None:
        """Forget what is behind the first `keep` tokens, then evaluate `ids`."""
        ll.llama_memory_seq_rm(ll.llama_get_memory(self._context), 0, keep, -1)
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            tokens = (ll.llama_token * len(part))(*part)
            if ll.llama_decode(self._context, ll.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama.cpp failed")

    def sample(self) -> int:
        """The next token, not evaluated."""
        return int(ll.llama_sampler_sample(self._chain, self._context, -1))

    def write(self, count: int) -> None:
        """`count` more tokens."""
        context, chain, token, step = self._context, self._chain, self._token, self._step
        for _ in range(count):
            token[0] = ll.llama_sampler_sample(chain, context, -1)
            ll.llama_decode(context, step)

    def close(self) -> None:
        ll.llama_sampler_free(self._chain)
        ll.llama_free(self._context)
        ll.llama_model_free(self._model)


def _chain(seed: int) -> Any:
    chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
    for stage in (
        ll.llama_sampler_init_top_k(_SAMPLING.top_k),
        ll.llama_sampler_init_top_p(_SAMPLING.top_p, 1),
        ll.llama_sampler_init_min_p(_SAMPLING.min_p, 1),
        ll.llama_sampler_init_temp(_SAMPLING.temperature),
        ll.llama_sampler_init_dist(seed),
    ):
        ll.llama_sampler_chain_add(chain, stage)
    return chain


@dataclass(frozen=True, slots=True)
class Completion:
    """How fast the `Llama` class answered."""

    text: str
    ttft_s: float
    tokens: int
    tokens_per_s: float


class HighLevel:
    """A chat program as one writes it with `Llama.create_completion(stream=True)` and the rendered prompt."""

    def __init__(self, path: Path, context: int) -> None:
        threads = physical_cores()
        self._llama = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def complete(self, prompt: str, max_tokens: int, seed: int = 1) -> Completion:
        """One reply. Ends early at the model's end token."""
        before = len(self._llama.tokenize(prompt.encode(), special=True))
        started, first, text = time.perf_counter(), 0.0, ""
        stream: Any = self._llama.create_completion(
            prompt,
            max_tokens=max_tokens,
            stream=True,
            seed=seed,
            temperature=_SAMPLING.temperature,
            top_k=_SAMPLING.top_k,
            top_p=_SAMPLING.top_p,
            min_p=_SAMPLING.min_p,
            repeat_penalty=_SAMPLING.repeat_penalty,
        )
        for chunk in stream:
            first = first or time.perf_counter()
            text += chunk["choices"][0]["text"]
        decoding = time.perf_counter() - first
        tokens = int(self._llama.n_tokens) - before  # the last one is never evaluated
        return Completion(text, first - started, tokens + 1, tokens / decoding)

    def close(self) -> None:
        self._llama.close()
