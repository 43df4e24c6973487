"""The sampler chain in torch. It means what llama.cpp's means: penalty, top-k, top-p, min-p, temperature, draw."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from koala_local.engine.sampling import Sampling


class TorchSampler:
    """Draws from what `logits` returns, (vocabulary,), with a generator of its own. Satisfies `Sampler`."""

    def __init__(
        self, logits: Callable[[], torch.Tensor], sampling: Sampling, seed: int, before: Sequence[int]
    ) -> None:
        self._logits, self._sampling = logits, sampling
        self._generator = torch.Generator().manual_seed(seed & 0xFFFFFFFF)
        last = sampling.repeat_last_n
        self._seen = deque(before[-last:] if last else (), maxlen=last)

    def sample(self) -> int:
        token = self._draw(self._penalized(self._logits().float().cpu()))
        self._seen.append(token)
        return token

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        if self._sampling.repeat_penalty == 1.0 or not self._seen:
            return logits
        seen = torch.tensor(sorted(set(self._seen)))
        chosen, penalty = logits[seen], self._sampling.repeat_penalty
        return logits.index_copy(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))

    def _draw(self, logits: torch.Tensor) -> int:
        if self._sampling.temperature == 0.0:
            return int(logits.argmax())
        values, tokens = candidates(logits, self._sampling)
        chances = torch.softmax(values / self._sampling.temperature, 0)
        return int(tokens[torch.multinomial(chances, 1, generator=self._generator)])

    def close(self) -> None:
        """Nothing is held."""


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and ids of the tokens that may be drawn, the likeliest first; one at least."""
    kept = min(sampling.top_k or len(logits), len(logits))
    values, tokens = logits.topk(kept)
    if sampling.top_p < 1.0:
        chances = torch.softmax(values, 0)
        before = chances.cumsum(0) - chances  # the first that reaches top_p is the last one kept
        kept = max(1, int((before < sampling.top_p).sum()))
        values, tokens = values[:kept], tokens[:kept]
    if sampling.min_p > 0.0:
        chances = torch.softmax(values, 0)
        kept = max(1, int((chances >= sampling.min_p * chances[0]).sum()))
        values, tokens = values[:kept], tokens[:kept]
    return values, tokens
