"""The model to be trained: transformers' LLaMA (or Mistral) from a checkpoint or from a seed, made ready in `build`.

On every path the model starts without weights, is cut over the ranks, and only then reads them, each rank its share.
Masters are kept in `master_dtype` whatever the files hold; only frozen weights are kept in the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PretrainedConfig

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig, read_configuration
from koala_local.wording import first_line

from . import adapters, attention, sharding
from .data.packing import Batch
from .dropout import add_dropout
from .loss import head_loss
from .settings import ModelShape, Settings
from .weights import Weights, fill, seeded_weights, stored_weights

_FAMILIES: dict[str, tuple[type[PretrainedConfig], Callable[[Any], nn.Module]]] = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "MistralForCausalLM": (MistralConfig, MistralForCausalLM),
}


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A micro-batch on the device."""

    ids: Tensor  # (rows, length)
    positions: Tensor  # (rows, length)
    documents: attention.Layout
    trained: Tensor  # (targets,): which tokens of the joined rows have a target
    targets: Tensor  # (targets,)
    weights: Tensor  # (targets,) float32, none 0


class Trainee(nn.Module):
    """What is trained. Its `model` is transformers'; parameters are `trainee.model.named_parameters()`, their names in
    a checkpoint `plain_name` of those."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.model.config
        return config

    def forward(self, inputs: Inputs, logits_at: Tensor | None = None) -> Tensor:
        """The sum of weight x loss over the micro-batch: a float32 scalar (float64 for a float64 model), 0 when nothing
        is trained. With `logits_at`, tokens of the joined rows, their logits instead: (tokens, vocabulary).
        Under sharding every rank must call this equally often."""
        ran = self.model.model(
            input_ids=inputs.ids, position_ids=inputs.positions, documents=inputs.documents, use_cache=False
        )
        hidden = ran.last_hidden_state.flatten(0, 1)
        head = self.model.lm_head.weight
        if logits_at is not None:
            return torch.as_tensor(hidden.index_select(0, logits_at) @ head.T)
        return head_loss(hidden.index_select(0, inputs.trained), head, inputs.targets, inputs.weights)


def inputs_of(batch: Batch, device: torch.device) -> Inputs:
    """The batch on the device. What depends on its layout is worked out here, so that no step waits for the device."""
    trained = np.flatnonzero(batch.weights)

    def put(array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    return Inputs(
        put(batch.ids),
        put(batch.positions),
        attention.layout(batch.documents, device),
        put(trained),
        put(batch.targets.reshape(-1)[trained]),
        put(batch.weights.reshape(-1)[trained]),
    )


def base_config(folder: Path, sequence_length: int) -> PretrainedConfig:
    """Of the checkpoint in `folder`, whose code, if it has any, is never run. Raises ModelFileError when it is missing,
    damaged, of another family, quantized, or too short for `sequence_length`."""
    found = read_configuration(folder / "config.json")
    limit = min(found.context, found.sliding_window or found.context)  # attention.py has no window
    if sequence_length > limit:
        what = f"sequence_length={sequence_length} is over the {limit} tokens of {str(folder)!r}"
        raise ModelFileError(what, f"set sequence_length={limit}")
    try:
        return _config(found)
    except Exception as error:  # transformers checks with many kinds of errors
        what = f"config.json in {str(folder)!r} is wrong: {first_line(error)}"
        raise ModelFileError(what, "get the checkpoint again") from None


def shape_config(shape: ModelShape, vocabulary_size: int) -> PretrainedConfig:
    """Of a new LLaMA."""
    found = ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        feed_forward_size=shape.feed_forward_size,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.hidden_size // shape.heads,
        norm_epsilon=shape.norm_epsilon,
        rope_base=shape.rope_base,
        context=shape.context,
        tied_embeddings=shape.tied_embeddings,
    )
    return _config(found)


def _config(found: ModelConfig) -> PretrainedConfig:
    """transformers'. The ids of special tokens are not in it: `export` writes the tokenizer's."""
    values = {
        **found.transformers_words(),
        "architectures": [found.architecture],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    return _FAMILIES[found.architecture][0](**values)


def compute_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Of the products. "auto" is bfloat16 on CUDA; elsewhere the masters' own."""
    if settings.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch_dtype(settings.master_dtype)
    return torch_dtype(settings.compute_dtype)


def build(
    config: PretrainedConfig, base: Path | None, settings: Settings, *, device: torch.device, mesh: DeviceMesh | None
) -> Trainee:
    """The model of `config` with the weights of the checkpoint `base` (None: new ones, by the seed), with adapters,
    dropout, recomputation, compilation and sharding as `settings` say, on `device`, in training mode.

    `mesh` is one-dimensional, of all ranks. None is for one rank whose masters and compute have one type; one rank
    with two types takes a mesh of one. Raises ModelFileError for a wrong base, KoalaError for a missing library."""
    compute, master = compute_dtype(settings, device), torch_dtype(settings.master_dtype)
    if mesh is None and compute != master:
        raise ValueError(f"computing in {compute} over masters in {master} takes a mesh")
    model = _empty(config, settings)
    weights = stored_weights(base, model, config) if base else seeded_weights(model, config, settings.seed)
    model.to(master if settings.lora is None else compute)
    if settings.lora:
        _add_adapters(model, weights, settings, compute, device)
    add_dropout(model, settings.dropout)
    trainee = Trainee(model)
    _wrap(trainee, settings, mesh, compute)
    _allocate(trainee, device)
    if config.tie_word_embeddings:
        trainee.model.tie_weights()
    fill(trainee.model, weights, settings.seed)
    _compute_rotation(trainee.model, device)
    return trainee.train()


def _empty(config: PretrainedConfig, settings: Settings) -> nn.Module:
    """The model without weights."""
    config._attn_implementation = attention.NAME
    config.attention_dropout = settings.attention_dropout
    config.use_cache = False
    with torch.device("meta"):
        return _FAMILIES[(config.architectures or [""])[0]][1](config)


def _add_adapters(
    model: nn.Module, weights: Weights, settings: Settings, compute: torch.dtype, device: torch.device
) -> None:
    assert settings.lora
    if settings.lora.four_bit:
        adapters.quantize_blocks(model, weights, compute, device)
    adapters.add_adapters(model, settings.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch_dtype(settings.master_dtype))


def _wrap(trainee: Trainee, settings: Settings, mesh: DeviceMesh | None, compute: torch.dtype) -> None:
    blocks = trainee.model.model.layers
    narrow = settings.lora.rank if settings.lora else 0
    sharding.recompute_blocks(blocks, settings.recompute, attention_draws=settings.attention_dropout > 0, narrow=narrow)
    if settings.compile:
        sharding.compile_blocks(blocks)
    if mesh is not None:
        reduce = torch.float64 if compute == torch.float64 else torch.float32
        whole = adapters.quantized_parameters(trainee)
        sharding.shard(trainee, blocks, mesh, compute, reduce_dtype=reduce, replicated=whole)


def _allocate(module: Any, device: torch.device) -> None:
    """Room on the device for what is on the meta device: this rank's share of it. What has values keeps them."""
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _compute_rotation(model: Any, device: torch.device) -> None:
    """The rotary frequencies, which are in no file and are made anew, in float32."""
    rotary = model.model.rotary_emb
    fresh = type(rotary)(model.config)
    for name, values in fresh.named_buffers():
        rotary.register_buffer(name, values.to(device), persistent=False)


def torch_dtype(name: str) -> torch.dtype:
    """The type of that name, such as "bfloat16"."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
