"""A checkpoint held in memory, made from a tiny transformers model: the source and the oracle have the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from koala_local.convert.sources.architecture import TensorInfo
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from koala_local.models.configuration import ModelConfig

torch.set_num_threads(1)  # a matrix of 64 columns gains nothing from a second thread and waits for it
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class InMemory:
    """A Checkpoint over a dictionary; `reads` counts how often each tensor was asked for."""

    tokenizer_folder: Path | None = None
    description = "in memory"

    def __init__(self, config: ModelConfig, state: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.state = dict(state)
        self.reads: dict[str, int] = {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, tuple(t.shape), _TYPES[t.dtype]) for name, t in self.state.items()}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        self.reads[name] = self.reads.get(name, 0) + 1
        return self.state[name] if rows is None else self.state[name][rows]


def tiny(*, seed: int = 0, scale: float = 5.0, **options: Any) -> tuple[PreTrainedModel, InMemory]:
    """A random model of two layers as transformers runs it, and the same as a checkpoint. `options` go to its config;
    `sliding_window` makes it a Mistral. Weights are scaled up so that attention is far from uniform."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **options,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel
    if "sliding_window" in options:
        model = MistralForCausalLM(MistralConfig(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scale) if "norm" not in name else parameter.normal_(1.0, 0.2)
    return model, InMemory(_config(model.config), {k: v.detach() for k, v in model.state_dict().items()})


def _config(config: Any) -> ModelConfig:
    rope = dict(config.rope_parameters)
    base = rope.pop("rope_theta")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_size=config.vocab_size,
        hidden_size=config.hidden_size,
        feed_forward_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_epsilon=config.rms_norm_eps,
        rope_base=base,
        context=config.max_position_embeddings,
        tied_embeddings=config.tie_word_embeddings,
        rope_scaling={} if rope.get("rope_type") == "default" else rope,
        sliding_window=getattr(config, "sliding_window", None),
    )


def random_ids(*shape: int, vocabulary: int = 300, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
