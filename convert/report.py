"""What is said of an output: size, quality, which cards it fits, as JSON and as a Markdown model card beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from koala_local.models.configuration import ModelConfig
from koala_local.wording import as_markdown, size

from .verify import Comparison

CARDS = (8, 10, 12, 16, 24)  # GiB
_RESERVED = 0.5  # GiB of a card that its driver and a desktop take
_KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # per number; q8_0 has a two-byte scale for every 32
_RUNTIME = 150 << 20  # bytes that a GPU runtime takes for its kernels and context
_MICRO_BATCH = 512  # tokens evaluated at once
_GIB = 1 << 30
_SOURCE_LICENCE = (
    "That of the source model, which quantization does not change. Derivatives of Meta's LLaMA fall under the LLaMA "
    "licence of their version."
)
_KOALA_LICENCE = (
    "For academic research only; commercial use is prohibited. The weights derive from Meta's LLaMA and fall under the "
    "LLaMA licence (non-commercial, research), whoever holds them must have been granted it. Koala's weight difference "
    "was published by its authors for research, subject also to the terms of use of OpenAI for data that its models "
    "generated, and to the privacy practices of ShareGPT."
)


@dataclass(frozen=True, slots=True)
class CardFit:
    """Memory in GiB at `context` tokens with a KV cache of `kv_type`, and the sizes of cards (GiB) that hold it all."""

    kv_type: str
    context: int
    weights: float
    kv_cache: float
    compute: float
    cards: tuple[int, ...]

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.compute


def card_fit(
    weight_bytes: int, config: ModelConfig, context: int = 2048, kv_types: Iterable[str] = tuple(_KV_BYTES)
) -> tuple[CardFit, ...]:
    """What a model of `weight_bytes` needs on a GPU, with a KV cache of each of the types. The compute part is an
    estimate: the logits and the widest activations of one micro-batch, and the runtime."""
    numbers = 2 * config.layers * config.kv_heads * config.head_size * context
    widest = config.vocabulary_size + 2 * config.feed_forward_size + 4 * config.hidden_size
    compute = (_RUNTIME + 4 * min(_MICRO_BATCH, context) * widest) / _GIB
    fits = []
    for kv_type in kv_types:
        kv_cache = numbers * _KV_BYTES[kv_type] / _GIB
        total = weight_bytes / _GIB + kv_cache + compute
        cards = tuple(card for card in CARDS if total <= card - _RESERVED)
        fits.append(CardFit(kv_type, context, weight_bytes / _GIB, kv_cache, compute, cards))
    return tuple(fits)


@dataclass(frozen=True, slots=True)
class Report:
    """An output and how it was made. `sample` says on what `comparison` was measured, `calibration` what was used."""

    name: str
    format: str  # "GGUF" or "GPTQ"
    kind: str
    size: int  # bytes of the file or files
    parameters: int
    bits_per_weight: float
    source: str
    fits: tuple[CardFit, ...]
    comparison: Comparison | None = None
    sample: str = ""
    calibration: str = ""
    notes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()  # what packed each type that takes a search
    licence: str = ""  # as the source states it

    def to_json(self) -> str:
        """One object, indented, with a newline at its end."""
        fits = [{**asdict(fit), "total": fit.total} for fit in self.fits]
        rounded = json.loads(json.dumps({**asdict(self), "fits": fits}), parse_float=lambda text: round(float(text), 6))
        return json.dumps(rounded, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def model_card(self) -> str:
        """Markdown. Names and notes come from files: what could act as markup in them is escaped."""
        parts = [
            f"{self._metadata()}# {as_markdown(self.name)}, {as_markdown(self.kind)}",
            f"Made by `koala quantize` from {as_markdown(self.source)}.",
            self._figures(),
            self._quality(),
            self._memory(),
            _limits(self._is_koala),
            self._licence(),
        ]
        if self.notes:
            parts.insert(5, "## Notes\n\n" + "\n".join(f"- {as_markdown(note)}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def _metadata(self) -> str:
        """What the hub, and `koala show`, read; JSON strings are YAML's too."""
        if not self.licence:
            return ""
        return f"---\nlicense: {json.dumps(self.licence)}\nmodel_name: {json.dumps(self.name)}\n---\n\n"

    def _figures(self) -> str:
        rows = [
            f"- Format: {self.format} {as_markdown(self.kind)}",
            f"- Weights: {self.parameters:,}, {self.bits_per_weight:.2f} bits each",
            f"- Size: {self.size:,} bytes ({size(self.size)})",
        ]
        if self.calibration:
            rows.append(f"- Calibrated on {as_markdown(self.calibration)}")
        rows += [f"- Packed {as_markdown(kernel)}" for kernel in self.kernels]
        return "\n".join(rows)

    def _quality(self) -> str:
        if not self.comparison:
            return "## Quality\n\nNot measured."
        c = self.comparison
        return (
            f"## Quality\n\nAgainst its source, {c.tokens:,} predictions on {as_markdown(self.sample)}:\n\n"
            "| | source | this model |\n|---|---|---|\n"
            f"| perplexity | {c.source_perplexity:.4f} | {c.perplexity:.4f} |\n\n"
            f"- KL divergence from the source: mean {c.kl_mean:.5f}, 99th percentile {c.kl_99:.4f}, "
            f"largest {c.kl_max:.4f} nats a token\n"
            f"- Same likeliest token: {c.same_top:.2%}\n\n"
            "The sample is small, and not one that others publish figures for: the difference counts, not the level."
        )

    def _memory(self) -> str:
        rows = [
            f"| {fit.kv_type} | {fit.weights:.2f} | {fit.kv_cache:.2f} | {fit.compute:.2f} | {fit.total:.2f} "
            f"| {_listed(fit.cards)} |"
            for fit in self.fits
        ]
        context = self.fits[0].context if self.fits else 2048
        head = "| KV cache | weights | KV | compute (estimate) | total | fits cards of |\n|---|---|---|---|---|---|"
        return f"## Memory at {context:,} tokens, in GiB\n\n{head}\n" + "\n".join(rows)

    def _licence(self) -> str:
        if self.licence:
            return (
                f"## Licence\n\n{as_markdown(self.licence)}, as the source states it; quantization does not change it."
            )
        return f"## Licence\n\n{_KOALA_LICENCE if self._is_koala else _SOURCE_LICENCE}"

    @property
    def _is_koala(self) -> bool:
        """Berkeley's, as far as its name tells: those weights state no free licence."""
        return "koala" in self.name.lower() and not self.licence


def _listed(cards: tuple[int, ...]) -> str:
    return ", ".join(f"{card}" for card in cards) + " GB" if cards else f"none up to {CARDS[-1]} GB"


def _limits(is_koala: bool) -> str:
    extra = (
        " It was trained on English dialogue of early 2023 and on a context of 2,048 tokens, without a system role."
        if is_koala
        else ""
    )
    return (
        "## What it cannot do\n\n"
        "It states falsehoods with confidence, repeats prejudices of its training data, calculates badly, knows "
        f"nothing that happened after its training and looks nothing up.{extra} Quantization adds errors to those of "
        "the source. Do not rely on it where a mistake does harm."
    )
