"""How a GPTQ checkpoint keeps a linear layer of `inputs` x `outputs`: AutoGPTQ's layout, version 1.

    qweight  int32 (inputs * bits / 32, outputs)   codes of one output, packed along the inputs
    qzeros   int32 (groups, outputs * bits / 32)   zero points minus one, packed along the outputs
    scales   float16 (groups, outputs)
    g_idx    int32 (inputs,)                       the group of each input
    weight[output, input] = (code - zero) * scale, both of the input's group

Packed values form a stream of bits, the lowest first: value k takes the bits from k * bits on. So 32 values fill
exactly `bits` words, and three-bit values may lie across two words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BLOCK = 32  # values that fill whole words, whatever the bits


@dataclass(frozen=True, slots=True)
class Layout:
    """The numbers that a layer's shapes follow from. `group_size` -1: one group of all inputs."""

    bits: int
    group_size: int

    def groups(self, inputs: int) -> int:
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    def shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """What each of PARTS must have. `inputs` and `outputs` must be multiples of 32."""
        groups = self.groups(inputs)
        return {
            "qweight": (inputs // _BLOCK * self.bits, outputs),
            "qzeros": (groups, outputs // _BLOCK * self.bits),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values (n, m) of 0 to 2^bits - 1, packed along the first dimension: int32 (n * bits / 32, m). n % 32 == 0."""
    blocks = values.reshape(-1, _BLOCK, values.shape[1])  # (n / 32, 32, m)
    words = torch.zeros(len(blocks), bits, values.shape[1], dtype=torch.int32, device=values.device)
    for k in range(_BLOCK):
        word, offset = divmod(k * bits, 32)
        value = blocks[:, k].to(torch.int32)
        words[:, word] |= value << offset
        if offset + bits > 32:
            words[:, word + 1] |= value >> (32 - offset)
    return words.flatten(0, 1)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack_rows` packed: uint8 (n, m)."""
    blocks = words.reshape(-1, bits, words.shape[1])
    values = torch.empty(len(blocks), _BLOCK, words.shape[1], dtype=torch.uint8, device=words.device)
    for k in range(_BLOCK):
        word, offset = divmod(k * bits, 32)
        value = blocks[:, word] >> offset
        if offset + bits > 32:
            low = 32 - offset
            value = (value & ((1 << low) - 1)) | (blocks[:, word + 1] << low)
        values[:, k] = value & ((1 << bits) - 1)
    return values.flatten(0, 1)


def unpack_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The zero points, int16 (groups, outputs): from 1 to 2^bits."""
    return unpack_rows(qzeros.T, bits).T.to(torch.int16) + 1


def dequantize_rows(
    qweight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor, bits: int
) -> torch.Tensor:
    """The weights of some inputs, (inputs, outputs), in the type of `scales`: `qweight` holds these inputs only and
    `groups` names the group of each; `zeros`, of the same type, and `scales` are (all groups, outputs)."""
    codes = unpack_rows(qweight, bits).to(scales.dtype)
    return codes.sub_(zeros[groups]).mul_(scales[groups])


def dequantize_groups(qweight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """As `dequantize_rows`, and several times faster: for whole groups of equal size that follow each other, with just
    their `zeros` and `scales`."""
    codes = unpack_rows(qweight, bits).to(scales.dtype).view(len(scales), -1, scales.shape[1])
    return codes.sub_(zeros[:, None]).mul_(scales[:, None]).flatten(0, 1)
