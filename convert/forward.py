"""A plain LLaMA forward that holds one decoder layer at a time, for models larger than memory.

    states = stream_layers(checkpoint, batches)                  # all layers over all batches, each layer read once
    for logits in Head.read(checkpoint).logits(states[0]):       # (tokens, vocabulary) in bounded pieces
        ...

GPTQ, the importance matrix and verification stand on it. It computes what transformers' LlamaForCausalLM and
MistralForCausalLM compute, in float32 on a CPU; on a GPU in the type asked for. There is no KV cache and no padding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch.nn import functional

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig

from .rotary import Rope, rotary_table
from .sources.architecture import Checkpoint

# Which linear layers share an input: the first word names the input to `Observe`.
INPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_output": ("self_attn.o_proj",),
        "feed_forward": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward_output": ("mlp.down_proj",),
    }
)
LINEAR = tuple(name for names in INPUTS.values() for name in names)
NORMS = ("input_layernorm", "post_attention_layernorm")

Observe = Callable[[str, torch.Tensor], None]  # (a key of INPUTS, the input as (tokens, columns))
LayerWeights = MutableMapping[
    str, torch.Tensor
]  # the names in LINEAR and NORMS; replace entries, never write into them
Progress = Callable[[int, int], None]  # (layers done, layers)

_ROWS = 4096  # embedding rows and head rows handled at once
LOGITS_BYTES = 256 << 20  # bytes of logits at once
STATES_BYTES = 4 << 30  # bytes of hidden states that stay in memory


@dataclass(frozen=True, slots=True)
class Compute:
    """Where layers are computed and in which type. Hidden states between layers are float32 on the CPU."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def read_layer(checkpoint: Checkpoint, index: int, compute: Compute | None = None) -> LayerWeights:
    """The weights of decoder layer `index`, by their names in LINEAR and NORMS. Raises ModelFileError."""
    compute = compute or Compute()
    prefix = f"model.layers.{index}."
    return {
        name: checkpoint.read(f"{prefix}{name}.weight").to(compute.device, compute.dtype) for name in (*LINEAR, *NORMS)
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def layer_forward(
    config: ModelConfig, weights: LayerWeights, hidden: torch.Tensor, rope: Rope, observe: Observe | None = None
) -> torch.Tensor:
    """The hidden states after one decoder layer, (batch, tokens, hidden), from those before it.

    `observe` sees the input of each group of linear layers in INPUTS before it is multiplied.
    """
    observe = observe or _unseen
    x = norm(config, weights, NORMS[0], hidden)
    observe("attention", x.flatten(0, -2))
    x = mix(config, weights, x, rope)
    observe("attention_output", x.flatten(0, -2))
    hidden = hidden + functional.linear(x, weights["self_attn.o_proj"])
    x = norm(config, weights, NORMS[1], hidden)
    observe("feed_forward", x.flatten(0, -2))
    x = widen(weights, x)
    observe("feed_forward_output", x.flatten(0, -2))
    return hidden + functional.linear(x, weights["mlp.down_proj"])


def _unseen(_: str, __: torch.Tensor) -> None:
    """Observes nothing."""


def norm(config: ModelConfig, weights: LayerWeights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """The input of attention or of the feed-forward part: `name` is of NORMS."""
    return rms_norm(hidden, weights[name], config.norm_epsilon)


def mix(config: ModelConfig, weights: LayerWeights, x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """q, k, v and attention over the normed states: what `o_proj` gets."""
    q, k, v = (functional.linear(x, weights[name]) for name in INPUTS["attention"])
    return _attention(config, rope, q, k, v)


def widen(weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """Gate and up over the normed states: what `down_proj` gets."""
    gate, up = (functional.linear(x, weights[name]) for name in INPUTS["feed_forward"])
    return functional.silu(gate) * up


def _attention(
    config: ModelConfig, rope: Rope, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Causal attention with grouped key/value heads: (batch, tokens, heads x head size)."""
    batch, tokens, _ = query.shape
    q = _rotate(query.view(batch, tokens, config.heads, config.head_size).transpose(1, 2), rope)
    k = _rotate(key.view(batch, tokens, config.kv_heads, config.head_size).transpose(1, 2), rope)
    v = value.view(batch, tokens, config.kv_heads, config.head_size).transpose(1, 2)
    # Repeated by hand: torch's own grouping on a CPU falls back to a kernel that holds tokens x tokens per head.
    k, v = (t.repeat_interleave(config.heads // config.kv_heads, dim=1) for t in (k, v))
    window = config.sliding_window
    mask = _window_mask(tokens, window, q.device) if window and tokens > window else None
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return mixed.transpose(1, 2).reshape(batch, tokens, -1)


def _rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = rope.cos.to(x.dtype), rope.sin.to(x.dtype)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _window_mask(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


class HiddenStates:
    """The hidden states of every batch, float32 on the CPU: in memory, or above STATES_BYTES in an unnamed file."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], folder: Path | None) -> None:
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.on_disk = sum(sizes) * 4 > STATES_BYTES
        if self.on_disk:
            with tempfile.TemporaryFile(dir=folder) as file:  # the map keeps the file's bytes until it is dropped
                flat = np.memmap(file, np.float32, "w+", shape=(sum(sizes),))
        else:
            flat = np.empty(sum(sizes), np.float32)  # type: ignore[assignment]
        ends = np.cumsum(sizes)
        parts = [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        self._batches = [torch.from_numpy(part).view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(batch, tokens, hidden), a view: writing into it changes what is kept."""
        return self._batches[index]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)


def embed(checkpoint: Checkpoint, batches: Sequence[torch.Tensor], folder: Path | None = None) -> HiddenStates:
    """The embeddings of each batch of ids, (batch, tokens) each. The table is read once, by blocks of rows.
    Raises ModelFileError for an id that the embedding has no row for."""
    config = checkpoint.config
    for ids in batches:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocabulary_size:
            raise ModelFileError(
                f"the tokenizer made token {int(ids.max())}, but the embedding has {config.vocabulary_size} rows",
                "the tokenizer belongs to another model, or the checkpoint is incomplete",
            )
    states = HiddenStates([(*ids.shape, config.hidden_size) for ids in batches], folder)
    for start in range(0, config.vocabulary_size, _ROWS):
        block = slice(start, min(start + _ROWS, config.vocabulary_size))
        found = [(ids >= block.start) & (ids < block.stop) for ids in batches]
        if any(bool(mask.any()) for mask in found):
            rows = checkpoint.read("model.embed_tokens.weight", block).float()
            for ids, mask, hidden in zip(batches, found, states, strict=True):
                hidden[mask] = rows[ids[mask] - start]
    return states


@torch.inference_mode()
def advance(
    config: ModelConfig,
    weights: LayerWeights,
    states: HiddenStates,
    observe: Observe | None = None,
    compute: Compute | None = None,
) -> None:
    """Replaces the states of every batch by what the layer makes of them."""
    compute = compute or Compute()
    for hidden in states:
        rope = rotary_table(config, hidden.shape[1], compute.device)
        x = hidden.to(compute.device, compute.dtype)
        hidden.copy_(layer_forward(config, weights, x, rope, observe))


def stream_layers(
    checkpoint: Checkpoint,
    batches: Sequence[torch.Tensor],
    observer: Callable[[int], Observe] | None = None,
    progress: Progress | None = None,
    *,
    compute: Compute | None = None,
    folder: Path | None = None,
) -> HiddenStates:
    """The hidden states after the last layer (before the final norm, which `Head` applies) of each batch of ids,
    (batch, tokens). Each layer's weights are read once; `observer(layer)` gives what observes it. `folder` is where
    states that do not fit in memory are kept. Raises ModelFileError."""
    states, layers = embed(checkpoint, batches, folder), checkpoint.config.layers
    for index in range(layers):
        observe = observer(index) if observer else None
        # Read where nothing holds them: one layer's weights are gone before the next one's are read.
        advance(checkpoint.config, read_layer(checkpoint, index, compute), states, observe, compute)
        if progress:
            progress(index + 1, layers)
    return states


@dataclass(frozen=True, slots=True)
class Head:
    """The final norm and the output matrix, the latter in its stored type."""

    norm: torch.Tensor
    output: torch.Tensor  # (vocabulary, hidden)
    epsilon: float
    compute: Compute

    @classmethod
    def read(cls, checkpoint: Checkpoint, compute: Compute | None = None) -> Head:
        """Reads both; the embedding serves where they are tied. Raises ModelFileError."""
        compute = compute or Compute()
        name = "model.embed_tokens.weight" if checkpoint.config.tied_embeddings else "lm_head.weight"
        norm = checkpoint.read("model.norm.weight").to(compute.device, compute.dtype)
        return cls(norm, checkpoint.read(name), checkpoint.config.norm_epsilon, compute)

    def logits(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of the tokens of `hidden` (.., hidden), in order: float32 pieces (rows, vocabulary) on the CPU,
        bounded in size whatever the vocabulary."""
        rows = max(1, LOGITS_BYTES // (4 * self.output.shape[0]))
        flat = hidden.flatten(0, -2)
        for start in range(0, len(flat), rows):
            yield self._logits(flat[start : start + rows])

    @torch.inference_mode()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self.normed(hidden)
        logits = torch.empty(len(hidden), self.output.shape[0])
        for start in range(0, self.output.shape[0], _ROWS):
            block = self.output[start : start + _ROWS].to(self.compute.device, self.compute.dtype)
            logits[:, start : start + _ROWS] = functional.linear(x, block).float().cpu()
        return logits

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The input of the output matrix, (.., hidden), on the device that computes."""
        return rms_norm(hidden.to(self.compute.device, self.compute.dtype), self.norm, self.epsilon)
