"""config.json of a Hugging Face checkpoint, in the spellings of 2023 and of today, as a ModelConfig."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koala_local.errors import ModelFileError
from koala_local.models.json_file import read_object, read_optional
from koala_local.models.reference import name_of

# "LLaMAForCausalLM" is how the class was called while it was being added to transformers; checkpoints kept it.
_ARCHITECTURES = {
    "LlamaForCausalLM": "LlamaForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "MistralForCausalLM": "MistralForCausalLM",
}
_MISTRAL_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}
_SCALINGS = ("linear", "dynamic", "yarn", "llama3")
_LARGEST = 1 << 31
_TEMPLATE_LIMIT = 1 << 20  # bytes
_SHOWN = 80
_SUPPORTED = "LlamaForCausalLM and MistralForCausalLM models are supported"
_REPAIR = "get the configuration again from where the model is published"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a LLaMA-family model, as config.json, params.json or a GGUF header give them."""

    architecture: str  # "LlamaForCausalLM" or "MistralForCausalLM"
    vocabulary_size: int  # rows of the embedding
    hidden_size: int
    feed_forward_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    norm_epsilon: float
    rope_base: float
    context: int
    tied_embeddings: bool
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # transformers' words; empty: none
    sliding_window: int | None = None
    bos: int | None = None  # as the configuration says; the tokenizer is trusted over it
    eos: tuple[int, ...] = ()
    name: str = ""
    licence: str = ""  # as the model card or the header states it

    @property
    def parameters(self) -> int:
        """All weights of the model."""
        attention = 2 * self.hidden_size * self.head_size * (self.heads + self.kv_heads)
        layer = attention + self.hidden_size * (3 * self.feed_forward_size + 2)
        ends = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * layer + ends + self.hidden_size

    def transformers_words(self) -> dict[str, Any]:
        """The numbers as keywords of transformers' LlamaConfig or MistralConfig."""
        mistral = self.architecture == "MistralForCausalLM"
        return {
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.feed_forward_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": {"rope_type": "default", **self.rope_scaling, "rope_theta": self.rope_base},
            "tie_word_embeddings": self.tied_embeddings,
            **({"sliding_window": self.sliding_window} if mistral else {}),
        }


class Settings:
    """Values of an untrusted configuration, checked as they are asked for. All raise ModelFileError."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str) -> ModelFileError:
        shown = repr(self.values.get(key))[:_SHOWN]
        return ModelFileError(f"{self.where}: {key!r} cannot be {shown}", _REPAIR)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is int and 0 < value < _LARGEST:
            return value
        raise self.fail(key)

    def number(self, key: str, default: float) -> float:
        """A positive finite number."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise self.fail(key)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.fail(key)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None or isinstance(value, dict):
            return dict(value or {})
        raise self.fail(key)

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id, several, or none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(type(number) is int and -1 <= number < _LARGEST for number in ids):
            return tuple(number for number in ids if number >= 0)
        raise self.fail(key)


def read_configuration(path: Path, *, quantized: bool = False) -> ModelConfig:
    """The model that a config.json describes. Raises ModelFileError for anything but a plain LLaMA or Mistral, and for
    weights that are quantized where the caller does not expect that."""
    settings = Settings(read_object(path), repr(str(path)))
    architecture = _architecture(settings)
    _refuse_variants(settings, quantized)
    if architecture == "MistralForCausalLM":
        settings.values = {**_MISTRAL_DEFAULTS, **settings.values}
    heads, hidden = settings.count("num_attention_heads"), settings.count("hidden_size")
    base, scaling = _rotary(settings)
    bos = settings.ids("bos_token_id")
    window = settings.values.get("sliding_window") is not None and architecture == "MistralForCausalLM"
    return ModelConfig(
        architecture=architecture,
        vocabulary_size=settings.count("vocab_size"),
        hidden_size=hidden,
        feed_forward_size=settings.count("intermediate_size"),
        layers=settings.count("num_hidden_layers"),
        heads=heads,
        kv_heads=_kv_heads(settings, heads),
        head_size=_head_size(settings, hidden, heads),
        norm_epsilon=settings.number("rms_norm_eps", 1e-6),
        rope_base=base,
        context=settings.count("max_position_embeddings", settings.count("max_sequence_length", 2048)),
        tied_embeddings=settings.flag("tie_word_embeddings"),
        rope_scaling=scaling,
        sliding_window=settings.count("sliding_window") if window else None,
        bos=bos[0] if bos else None,
        eos=settings.ids("eos_token_id"),
        name=name_of(path.absolute().parent),
    )


def read_quantization(folder: Path) -> Settings:
    """How the weights of a checkpoint's folder are quantized: what config.json says, or the quantize_config.json of
    2023; without values where they are not. Raises ModelFileError."""
    found = Settings(read_optional(folder / "config.json"), "config.json").mapping("quantization_config")
    if found:
        return Settings(found, "config.json's quantization_config")
    return Settings(read_optional(folder / "quantize_config.json"), "quantize_config.json")


def quantization_method(quantization: object) -> str:
    """Its name in a `quantization_config`, "" where it is not told."""
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return method.lower() if isinstance(method, str) else ""


def read_template(folder: Path) -> str | None:
    """The chat template of a checkpoint's folder: chat_template.jinja, else the default one of tokenizer_config.json.
    Raises ModelFileError for one that is too large, or cannot be read."""
    try:
        with (folder / "chat_template.jinja").open("rb") as file:
            template: Any = file.read(_TEMPLATE_LIMIT + 1).decode("utf-8", "replace")
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise ModelFileError(f"chat_template.jinja in {folder} cannot be read: {error.strerror}", _REPAIR) from None
        template = read_optional(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
    if not isinstance(template, str) or not template:
        return None
    if len(template.encode("utf-8", "replace")) > _TEMPLATE_LIMIT:
        raise ModelFileError(f"the chat template in {folder} is larger than 1 MiB", "no honest template is that large")
    return template


def refuse_unquantized(folder: Path) -> None:
    """Raise ModelFileError for a checkpoint that `koala quantize` reads and chat does not."""
    if read_quantization(folder).values:
        return
    read_configuration(folder / "config.json")  # another architecture has its own message
    what = f"{name_of(folder)} is an unquantized checkpoint; chat runs GGUF and GPTQ models"
    raise ModelFileError(what, f"koala quantize {shlex.quote(str(folder))} --bits 4 makes one of it")


def _architecture(settings: Settings) -> str:
    named = settings.values.get("architectures")
    if named is None and settings.values.get("model_type") in ("llama", "mistral"):
        named = [f"{str(settings.values['model_type']).capitalize()}ForCausalLM"]
    first = named[0] if isinstance(named, list) and len(named) == 1 else named
    if isinstance(first, str) and first in _ARCHITECTURES:
        return _ARCHITECTURES[first]
    raise ModelFileError(f"{settings.where}: the architecture {str(first)[:_SHOWN]!r} is not supported", _SUPPORTED)


def _refuse_variants(settings: Settings, quantized: bool) -> None:
    """Raise for what makes another model of a LLaMA, or code of it."""
    if settings.values.get("auto_map"):
        what = "the model comes with code of its own (auto_map), which is never run"
        raise ModelFileError(f"{settings.where}: {what}", _SUPPORTED)
    if (quantization := settings.mapping("quantization_config")) and not quantized:
        kind = str(quantization.get("quant_method", "unknown"))[:_SHOWN]
        what = f"the model is quantized already ({kind!r})"
        raise ModelFileError(f"{settings.where}: {what}", "get the model in its 16-bit form")
    for key in ("attention_bias", "mlp_bias"):
        if settings.flag(key):
            raise ModelFileError(f"{settings.where}: {key} is set, and biases are not supported", _SUPPORTED)
    if settings.values.get("hidden_act", "silu") != "silu":
        raise settings.fail("hidden_act")
    if settings.number("partial_rotary_factor", 1.0) != 1.0:
        raise settings.fail("partial_rotary_factor")


def _kv_heads(settings: Settings, heads: int) -> int:
    kv_heads = settings.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise settings.fail("num_key_value_heads")
    return kv_heads


def _head_size(settings: Settings, hidden: int, heads: int) -> int:
    if settings.values.get("head_dim") is None and hidden % heads:
        raise settings.fail("num_attention_heads")
    size = settings.count("head_dim", hidden // heads)
    if size % 2:
        raise settings.fail("head_dim")
    return size


def _rotary(settings: Settings) -> tuple[float, Mapping[str, Any]]:
    """The rotary base, and the scaling in today's words: {"rope_type": .., ..}, empty when there is none."""
    found = {**settings.mapping("rope_scaling"), **settings.mapping("rope_parameters")}
    base = Settings(found, settings.where).number("rope_theta", settings.number("rope_theta", 10000.0))
    found.pop("rope_theta", None)
    old = found.pop("type", None)
    kind = found.setdefault("rope_type", old or "default")
    if Settings(found, settings.where).number("partial_rotary_factor", 1.0) != 1.0:
        raise settings.fail("rope_parameters")
    if kind == "default":
        return base, {}
    if kind not in _SCALINGS:
        what = f"positions are scaled by {str(kind)[:_SHOWN]!r}; known are {', '.join(_SCALINGS)}"
        raise ModelFileError(f"{settings.where}: {what}", _SUPPORTED)
    return base, found
