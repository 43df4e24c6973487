"""What is wrapped around a model's blocks: activation recomputation, compilation, sharding (FSDP2). In this order.

What a block keeps for its backward pass, in numbers of the compute type per token (D: hidden size, F: feed-forward
size, KV: size of all keys, = D without grouped heads), and 4 bytes per head:
  full       D: the block's input. The block runs twice.
  selective  5 D + 2 KV + 2 F: the input, and what its matrix products and its attention made. Norms, rotation,
             activation, additions and the adapters' narrow products run twice, everything else once.
  none       11 D + 4 F in float32, 13 D + 4 F in 16 bits, since norms compute in float32. With adapters of rank r over
             a frozen base 2 D less and 7 r more; their dropout adds 12 D + 2 F.
Measured on the CPU (D 256, F 688 and 1024, float32 and bfloat16) to 1 %. Dropout of residuals adds 2 D to "none" there,
and a byte in place of each of these numbers on CUDA. While a block runs its backward pass it holds what "none" keeps,
whatever the mode. The head is apart: see `loss.py`.

On the CPU a compiled block with recomputation runs as if it was not compiled: the loop over documents cannot be traced.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 1, _aten.addmm.default: 2}  # and where the weight is among its arguments
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def plain_name(name: str) -> str:
    """A parameter's name as it was before its module was wrapped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def recompute_blocks(blocks: nn.ModuleList, mode: Recompute, *, attention_draws: bool = False, narrow: int = 0) -> None:
    """Let each block forget its activations and compute them again in the backward pass: all of them ("full"), or all
    but the dear ones ("selective"). `attention_draws`: attention has dropout, so it is computed again, too: if it was
    skipped, the dropout behind it would draw other numbers than in the forward pass. Products with a weight at most
    `narrow` wide or high, the rank of adapters, are not dear."""
    if mode == "none":
        return
    options: dict[str, Any] = {"preserve_rng_state": True}
    if mode == "selective":
        kept = frozenset() if attention_draws else _attention_operators()
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kept, narrow))
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block, **options)


def _attention_operators() -> frozenset[Any]:
    import torch.nn.attention.varlen  # registers the operator

    return frozenset({*_ATTENTION, torch.ops.torch_attn._varlen_attn.default})


def _policy(
    kept: frozenset[Any], narrow: int, context: Any, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    wide = operator in _PRODUCTS and min(arguments[_PRODUCTS[operator]].shape) > narrow
    return CheckpointPolicy.MUST_SAVE if wide or operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(blocks: nn.ModuleList, backend: str = "inductor") -> None:
    """torch.compile each block: they are alike, so the first one's code serves all."""
    for index, block in enumerate(blocks):
        compiled: Any = torch.compile(block, backend=backend)
        blocks[index] = compiled


def shard(
    root: nn.Module,
    blocks: nn.ModuleList,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    reduce_dtype: torch.dtype,
    replicated: frozenset[nn.Parameter] = frozenset(),
) -> None:
    """Cut every parameter over the ranks of `mesh`; each block, and the rest as one, is gathered when it runs, in
    `compute_dtype`. `replicated` (the quantized ones) stay whole on every rank. Gradients are SUMMED over the ranks, in
    `reduce_dtype`: a backward pass of `loss sum / weight of the whole global batch` is right on every rank, as it is
    without ranks."""
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )  # inputs are token ids and weights; blocks get what the embedding made
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(replicated))
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=set(replicated))
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # or gloo fails on the factor
