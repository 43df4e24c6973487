"""The numbers of a model that its memory depends on, from the table of its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from koala_local.models.gguf_header import GgufHeader, Tensor, read_header

_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)")
_FIRST = re.compile(r"(.+)-00001-of-(\d{5})\.gguf", re.IGNORECASE)
_REPACK_ROWS = 8  # llama.cpp puts so many rows of a matrix side by side


@dataclass(frozen=True, slots=True)
class Block:
    """Weights that are placed together. `repackable`: bytes by type of what a CPU may want in another order."""

    size: int = 0
    repackable: Counter[str] = field(default_factory=Counter)


class Shape(NamedTuple):
    """The numbers of a model that its memory depends on."""

    layers: tuple[Block, ...]
    input: Block  # the embedding and what else never leaves the CPU
    output: Block
    embedding: int
    feed_forward: int
    vocabulary: int
    kv_widths: tuple[tuple[int, int], ...]  # values of K and of V for a token, by layer
    head_size: int
    trained_context: int | None
    tied: bool = False  # the output is the embedding: on a GPU it is there as well as in RAM

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return self.input.size + self.output.size + sum(layer.size for layer in self.layers)

    @property
    def placeable(self) -> int:
        """What --gpu-layers counts: the layers, and the output as one more."""
        return len(self.layers) + 1

    @property
    def is_estimate(self) -> bool:
        """Whether some layer keeps its history in another way than K and V of every token."""
        return not self.layers or any(not key for key, _ in self.kv_widths)


def all_tensors(header: GgufHeader) -> tuple[Tensor, ...]:
    """The tensors of all files of the model: of one in several (`-00001-of-00003`) the first file is what is opened,
    and says how many there are. Raises ModelFileError where one is missing or damaged."""
    match = _FIRST.fullmatch(header.path.name)
    count = header.metadata.get("split.count")
    if match is None or type(count) is not int or count != int(match[2]):
        return header.tensors
    tensors = header.tensors
    for number in range(2, count + 1):
        tensors += read_header(header.path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf")).tensors
    return tensors


def read_shape(header: GgufHeader, tensors: Sequence[Tensor]) -> Shape:
    """The shape of the model with these tensors, those of all its files. Sizes come from the tensors, which lie in the
    file, rather than from the metadata, which may say anything."""
    layers: dict[int, list[Tensor]] = {}
    rest: list[Tensor] = []
    for tensor in tensors:
        match = _LAYER.fullmatch(tensor.name)
        (layers.setdefault(int(match[1]), []) if match else rest).append(tensor)
    blocks = [layers[number] for number in sorted(layers)]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    embedding, vocabulary = (*shapes.get("token_embd.weight", ()), 0, 0)[:2]
    outputs = [tensor for tensor in rest if tensor.name.startswith("output")]
    inputs = [tensor for tensor in rest if not tensor.name.startswith("output")]
    tied = "output.weight" not in shapes
    if tied:
        outputs += [tensor for tensor in rest if tensor.name == "token_embd.weight"]
        inputs = [tensor for tensor in inputs if tensor.name != "token_embd.weight"]
    widths = [_rows(block, r"ffn_(?:up|gate|down)\.weight", 0) for block in blocks]
    widths += [_rows(block, r"ffn_(?:up|gate)\.weight", 1) for block in blocks]
    return Shape(
        layers=tuple(_block(block) for block in blocks),
        input=Block(sum(tensor.size for tensor in inputs)),
        output=_block(outputs),
        embedding=embedding,
        feed_forward=max(widths, default=0),
        vocabulary=vocabulary,
        kv_widths=tuple(_kv_widths(header, block, embedding) for block in blocks),
        head_size=_head_size(header, embedding),
        trained_context=header.context_length,
        tied=tied,
    )


def _block(tensors: Sequence[Tensor]) -> Block:
    repackable: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) == 2 and tensor.shape[1] % _REPACK_ROWS == 0 and tensor.name != "token_embd.weight":
            repackable[tensor.type] += tensor.size
    return Block(sum(tensor.size for tensor in tensors), repackable)


def _rows(block: Sequence[Tensor], pattern: str, axis: int) -> int:
    """The largest size along `axis` of the block's matrices of that name."""
    named = [tensor for tensor in block if re.search(rf"\.{pattern}$", tensor.name) and len(tensor.shape) > axis]
    return max((tensor.shape[axis] for tensor in named), default=0)


def _kv_widths(header: GgufHeader, block: Sequence[Tensor], embedding: int) -> tuple[int, int]:
    key, value = _rows(block, r"attn_k\.weight", 1), _rows(block, r"attn_v\.weight", 1)
    if not key and (together := _rows(block, r"attn_qkv\.weight", 1)) > embedding:
        return (together - embedding) // 2, (together - embedding) // 2
    return key, value or key


def _head_size(header: GgufHeader, embedding: int) -> int:
    size = header.metadata.get(f"{header.architecture}.attention.key_length")
    heads = header.metadata.get(f"{header.architecture}.attention.head_count")
    if type(size) is int and size > 0:
        return size
    return embedding // heads if type(heads) is int and heads > 0 else 0
