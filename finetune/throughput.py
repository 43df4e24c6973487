"""What a token costs and how fast a GPU is: work per token, peak rates, typical prices.

Model FLOPs utilization (MFU) is as everybody counts it: 6 FLOP a weight and token, forward and backward, and
12 x layers x hidden size x sequence length for attention over the whole row; recomputation is no useful work.
(PaLM, arXiv:2204.02311, appendix B.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .settings import ModelShape, Settings

PRICES_OF = "early 2026"
_LAYERS_RECOMPUTED = {"none": 0.0, "selective": 0.0, "full": 1.0}  # of a forward pass's time


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU. `peak` is dense bf16 matrix throughput; prices are typical ones of rental, per hour."""

    name: str
    peak: float  # FLOP a second
    memory: float  # bytes, as sold
    on_demand: float  # dollars an hour
    preemptible: float
    utilization: float  # the MFU a plan assumes: what good trainers have reached on it


A100 = Gpu("A100", 312e12, 80e9, on_demand=1.80, preemptible=0.90, utilization=0.50)
H100 = Gpu("H100", 989e12, 80e9, on_demand=3.00, preemptible=2.00, utilization=0.40)
RTX_4090 = Gpu("4090", 165e12, 24e9, on_demand=0.50, preemptible=0.30, utilization=0.40)
GPUS = (A100, H100, RTX_4090)


@dataclass(frozen=True, slots=True)
class Numbers:
    """The sizes of a LLaMA that decide what training it takes."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any) -> Numbers:
        """Those of a transformers LlamaConfig."""
        return cls(
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            feed_forward=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            tied=bool(config.tie_word_embeddings),
        )

    @classmethod
    def of_shape(cls, shape: ModelShape, vocabulary: int) -> Numbers:
        """Those of a model that is trained from scratch."""
        return cls(
            vocabulary,
            shape.hidden_size,
            shape.feed_forward_size,
            shape.layers,
            shape.heads,
            shape.kv_heads,
            shape.hidden_size // shape.heads,
            shape.tied_embeddings,
        )

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a block's seven linear layers."""
        wide, d, f = self.heads * self.head_size, self.hidden, self.feed_forward
        return ((d, wide), (d, self.kv_width), (d, self.kv_width), (wide, d), (d, f), (d, f), (f, d))

    @property
    def block(self) -> int:
        """Weights of one block, its two norms included."""
        return sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Weights of the embedding, which is as large as the output layer."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.hidden + self.embedding * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on every linear layer of the blocks."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)


def work_per_token(numbers: Numbers, sequence_length: int, *, adapters: int = 0) -> float:
    """FLOP to train on one token. With adapters (their weights) the base gets no weight gradients: 4 a weight."""
    attention = 12 * numbers.layers * numbers.hidden * sequence_length
    if adapters:
        return 4 * numbers.parameters + 6 * adapters + attention
    return 6 * numbers.parameters + attention


def work_of(numbers: Numbers, settings: Settings) -> float:
    """FLOP a token of a run with these settings."""
    adapters = numbers.adapters(settings.lora.rank) if settings.lora else 0
    return work_per_token(numbers, settings.sequence_length, adapters=adapters)


def tokens_per_second(peak: float, utilization: float, work: float) -> float:
    """Tokens a second of one GPU, `work` being the FLOP of each."""
    return peak * utilization / work


def slowdown(settings: Settings) -> float:
    """How many times longer a step takes for what is computed twice: a whole forward pass is a third of the work."""
    return 1 + _LAYERS_RECOMPUTED[settings.recompute] / 3


def utilization(tokens_a_second: float, work: float, peak: float, gpus: int = 1) -> float:
    """The MFU of a measured rate over all `gpus`."""
    return tokens_a_second * work / (peak * gpus)


def known_gpu(name: str) -> Gpu | None:
    """The kind that a device's own name says, as "NVIDIA A100-SXM4-80GB"; None for one whose peak is not listed, such
    as an H100 that is no SXM module."""
    words = name.replace("-", " ").split()
    slower = ("H100" in words and ("PCIe" in words or "NVL" in words)) or words[-2:] == ["4090", "D"]
    return None if slower else next((gpu for gpu in GPUS if gpu.name in words), None)
