"""Which tensors a LLaMA-family model has, by Hugging Face's names, in the order in which a model runs through them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig

from .architecture import TensorInfo
from .stored import ITEM_BYTES, Stored

_SHOWN = 100  # characters of a tensor's name in an error
_ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HINT = "check that all files are there and belong to one model"


def expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the model."""
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    yield "model.embed_tokens.weight", (config.vocabulary_size, hidden)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (feed_forward, hidden)
        yield prefix + "mlp.up_proj.weight", (feed_forward, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, feed_forward)
    yield "model.norm.weight", (hidden,)
    if not config.tied_embeddings:
        yield "lm_head.weight", (config.vocabulary_size, hidden)


@dataclass(frozen=True, slots=True)
class FileCheckpoint:
    """A Checkpoint whose tensors lie in files. What `assembled` returns has been checked against `config`."""

    config: ModelConfig
    tokenizer_folder: Path | None
    description: str
    stored: Mapping[str, Stored] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some of its rows, in memory of its own. Raises ModelFileError for a name that is not there."""
        if name not in self.tensors:
            raise ModelFileError(f"there is no tensor {name[:_SHOWN]!r} in {self.description}", _HINT)
        start, stop, step = (rows or slice(None)).indices(self.tensors[name].shape[0])
        if step != 1:
            raise ValueError(f"rows of {name} must be contiguous, not every {step}th")
        return self.stored[name].read(start, max(start, stop))


def assembled(
    config: ModelConfig, stored: Mapping[str, Stored], *, tokenizer_folder: Path | None, description: str
) -> FileCheckpoint:
    """The tensors that the model needs, in running order. Raises ModelFileError when one is missing, is of another
    shape than the configuration says or of a type that is not read, and when there is one that nothing uses."""
    infos: dict[str, TensorInfo] = {}
    for name, shape in expected(config):
        infos[name] = _checked(name, shape, stored, description)
    _refuse_unknown(config, (name for name in stored if name not in infos), stored)
    used = {name: stored[name] for name in infos}
    return FileCheckpoint(config, tokenizer_folder, description, used, infos)


def _checked(name: str, shape: tuple[int, ...], stored: Mapping[str, Stored], description: str) -> TensorInfo:
    if name not in stored:
        raise ModelFileError(f"the tensor {name} is missing from {description}", _HINT)
    found = stored[name]
    if found.shape != shape:
        what = f"{name} in {found.origin} has the shape {_shown(found.shape)}; the configuration asks for"
        raise ModelFileError(f"{what} {_shown(shape)}", _HINT)
    if found.dtype not in ITEM_BYTES:
        hint = "get the model in bfloat16, float16 or float32"
        raise ModelFileError(f"{name} in {found.origin} is stored as {found.dtype[:_SHOWN]}, which is not read", hint)
    return TensorInfo(name, shape, found.dtype)


def _refuse_unknown(config: ModelConfig, extra: Iterable[str], stored: Mapping[str, Stored]) -> None:
    """Raise for tensors that the model does not use: without them it would compute something else."""
    for name in extra:
        if _ROTARY_TABLE.fullmatch(name) or (config.tied_embeddings and name == "lm_head.weight"):
            continue
        where = f"{stored[name].origin} holds {name[:_SHOWN]!r}"
        if name.endswith(".bias"):
            raise ModelFileError(f"{where}: biases are not supported", "this model cannot be converted")
        raise ModelFileError(f"{where}, which a {config.architecture} does not have", _HINT)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "of a single number"
