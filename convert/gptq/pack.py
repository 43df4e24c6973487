"""A quantized matrix in the layout of GPTQ checkpoints (`koala_local.engine.gptq_layout`), written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from koala_local.engine.gptq_layout import BITS, PARTS, Layout, pack_rows, unpack_rows, unpack_zeros
from koala_local.errors import ModelFileError

__all__ = ["BITS", "PARTS", "Layout", "QuantizedMatrix", "check_size", "pack", "unpack"]

_TYPES = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """weight[o, i] = (codes[o, i] - zeros[g, o]) * scales[g, o] with g = groups[i]."""

    codes: torch.Tensor  # uint8 (outputs, inputs)
    zeros: torch.Tensor  # int16 (groups, outputs), from 1 to 2^bits: the layout has no zero point 0
    scales: torch.Tensor  # float16 (groups, outputs)
    groups: torch.Tensor  # int32 (inputs,)

    def dequantized(self) -> torch.Tensor:
        """float32 (outputs, inputs)."""
        index = self.groups.long()
        codes = self.codes.T.float()
        return codes.sub_(self.zeros[index]).mul_(self.scales[index].float()).T

    def rows(self, part: slice) -> QuantizedMatrix:
        """Some outputs of it."""
        return QuantizedMatrix(self.codes[part], self.zeros[:, part], self.scales[:, part], self.groups)


def check_size(name: str, outputs: int, inputs: int) -> None:
    """Raise ModelFileError where the layout has no room for a matrix of this size."""
    if inputs % 32 or outputs % 32:
        raise ModelFileError(
            f"{name} is {outputs} x {inputs}: GPTQ packs 32 values at a time and needs multiples of 32",
            "use --format gguf for this model",
        )


def pack(matrix: QuantizedMatrix, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of PARTS, each contiguous and with memory of its own. Raises ModelFileError for other sizes than
    multiples of 32."""
    check_size("the matrix", *matrix.codes.shape)
    parts = {
        "qweight": pack_rows(matrix.codes.T, bits),
        "qzeros": pack_rows((matrix.zeros - 1).T, bits).T,
        "scales": matrix.scales.to(torch.float16),
        "g_idx": matrix.groups.to(torch.int32),
    }
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}


def unpack(parts: Mapping[str, torch.Tensor], bits: int) -> QuantizedMatrix:
    """What `pack` packed, or any program that writes version 1. Raises ModelFileError for parts that do not fit."""
    _check_parts(parts, bits)
    return QuantizedMatrix(
        unpack_rows(parts["qweight"], bits).T,
        unpack_zeros(parts["qzeros"], bits),
        parts["scales"],
        parts["g_idx"],
    )


def _check_parts(parts: Mapping[str, torch.Tensor], bits: int) -> None:
    for name in PARTS:
        if name not in parts or parts[name].dtype != _TYPES[name]:
            raise ModelFileError(f"{name} is missing or is not {str(_TYPES[name]).removeprefix('torch.')}")
    inputs, (groups, outputs) = len(parts["g_idx"]), parts["scales"].shape
    fitting = {
        "qweight": (inputs // 32 * bits, outputs),
        "qzeros": (groups, outputs // 32 * bits),
    }
    if inputs % 32 or outputs % 32 or any(tuple(parts[name].shape) != shape for name, shape in fitting.items()):
        raise ModelFileError(
            f"the packed parts do not fit each other: { ({n: tuple(p.shape) for n, p in parts.items()}) }"
        )
    if inputs and not 0 <= int(parts["g_idx"].min()) <= int(parts["g_idx"].max()) < groups:
        raise ModelFileError(f"g_idx names groups that are not there: there are {groups}")
