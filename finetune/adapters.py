"""LoRA and QLoRA: the base stays as it is, small matrices beside every linear layer of the blocks are trained.

W x becomes W x + alpha / rank * B A x (Hu et al. 2021). For QLoRA (Dettmers et al. 2023) W is kept in NF4, blocks of 64
weights with one scale each, the scales in 8 bits: about 4.13 bits per weight. NF4 weights are whole on every rank; the
adapters, embedding, head and norms are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koala_local.errors import KoalaError

from .settings import LoraSettings
from .weights import Weights, open_checkpoint

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = "default"  # of the adapter, in peft


def add_adapters(model: nn.Module, lora: LoraSettings) -> None:
    """Freeze `model` and put adapters beside every linear layer of its blocks. They have no values yet (they are on the
    meta device): `fill` gives them some. Raises KoalaError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise KoalaError("LoRA needs peft", "install it: pip install 'koala-local[finetune]'") from None
    alpha: Any = lora.alpha  # declared as int, used as it is
    config = LoraConfig(
        r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=list(_TARGETS), bias="none"
    )
    inject_adapter_in_model(config, model, _NAME, low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def quantize_blocks(model: nn.Module, weights: Weights, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Replace every linear layer of the blocks of `model` by one whose weights, read here and one at a time, are in NF4
    on `device`. Raises KoalaError without bitsandbytes."""
    try:
        from bitsandbytes import nn as quantized_nn
    except (ImportError, RuntimeError):
        raise KoalaError("QLoRA needs bitsandbytes", "install it: pip install 'koala-local[qlora]'") from None
    layers: Any = quantized_nn
    for name, linear in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own not in _TARGETS or not isinstance(linear, nn.Linear):
            continue
        weight = weights.read(f"{name}.weight", slice(0, linear.out_features)).to(compute_dtype)
        quantized = layers.Linear4bit(
            linear.in_features, linear.out_features, False, compute_dtype=compute_dtype, quant_type="nf4", device="meta"
        )
        quantized.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized).to(device)
        # On processors with bfloat16 it would be repacked at the first evaluation, its scales rounded: another base.
        quantized.support_avx512bf16_for_cpu = False
        setattr(model.get_submodule(parent), own, quantized)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # so that peft puts layers of its own beside them


def quantized_parameters(model: nn.Module) -> frozenset[nn.Parameter]:
    """Those in NF4."""
    return frozenset(parameter for parameter in model.parameters() if not parameter.is_floating_point())


def merge_into_base(folder: Path, adapters: Mapping[str, Tensor], lora: LoraSettings) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in `folder`, one at a time, with its adapter added where it has one: computed in
    float32 (float64 for float64), returned in the type that the checkpoint stores. `adapters` are whole tensors by
    plain names ("model.layers.0.self_attn.q_proj.lora_A.default.weight"). The sum is of the original weights, not
    of NF4 ones, whose error it would keep. Raises ModelFileError, and KoalaError for an adapter without a weight."""
    pairs = _pairs(adapters)
    stored = open_checkpoint(folder)
    if strangers := pairs.keys() - stored.files.keys():
        what = f"the adapter of {min(strangers)} has no weight in {str(folder)!r}"
        raise KoalaError(what, "merge into the base that the adapters were trained on")
    for name in stored.files:
        weight = stored.read(name, slice(None))
        yield name, _merged(weight, *pairs[name], lora.alpha / lora.rank) if name in pairs else weight


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    change = (up.to("cpu", wide) @ down.to("cpu", wide)) * scale
    return (weight.to(wide) + change).to(weight.dtype)


def _pairs(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the weight they belong to."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, down in adapters.items():
        own, a, _ = name.partition(".lora_A.")
        if a:
            pairs[f"{own}.weight"] = (down, adapters[name.replace(".lora_A.", ".lora_B.")])
    return pairs


def adapter_state(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of named parameters those that belong to adapters."""
    return {name: parameter for name, parameter in parameters.items() if ".lora_" in name}
