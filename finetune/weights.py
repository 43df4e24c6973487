"""Where a model's first weights come from: a checkpoint's files, or a seed. Each is read some rows at a time, so that a
rank reads its own share only and no rank ever holds a whole large model."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig

from koala_local.errors import ModelFileError
from koala_local.models.json_file import member, read_object
from koala_local.wording import first_line

from .dropout import seed_of
from .sharding import plain_name

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_COMPUTED = ".rotary_emb.inv_freq"  # old checkpoints store them
_STD = 0.02
_DAMAGED = "the download is incomplete or damaged: get the checkpoint again"
_SHOWN = 100


class Weights(Protocol):
    """Tensors by the names that transformers gives them."""

    def read(self, name: str, rows: slice) -> Tensor:
        """Those rows of the tensor, on the processor, in the type it is stored in."""
        ...


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of weights, mapped into memory."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    part: Callable[[str, slice], Tensor]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A Hugging Face checkpoint's, lazily."""

    files: Mapping[str, OpenFile]  # of each tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of the largest tensor. Raises ModelFileError."""
        largest = max(self.files, key=lambda name: math.prod(self.files[name].shapes[name]))
        return self.read(largest, slice(0, 1)).dtype

    def read(self, name: str, rows: slice) -> Tensor:
        """Raises ModelFileError when the file cannot be read."""
        file = self.files[name]
        try:
            tensor = file.part(name, rows)
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            what = f"{file.path.name}: {name} cannot be read: {first_line(error, _SHOWN)}"
            raise ModelFileError(what, _DAMAGED) from None
        if not tensor.is_floating_point():
            what = f"{file.path.name}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}"
            raise ModelFileError(what, "a quantized checkpoint cannot be trained: give the one it was made from")
        return tensor


@dataclass(frozen=True, slots=True)
class SeededWeights:
    """First weights of a new model, each a pure function of (seed, name): normal with a deviation of 0.02, that of the
    projections back into the residual stream divided by sqrt(2 x layers) as in GPT-2; norms are 1."""

    shapes: dict[str, tuple[int, ...]]
    layers: int
    seed: int

    def read(self, name: str, rows: slice) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)[rows]
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = _STD / math.sqrt(2 * self.layers) if residual else _STD
        generator = torch.Generator().manual_seed(seed_of(self.seed, name))
        return torch.normal(0.0, deviation, shape, generator=generator)[rows]


def stored_weights(folder: Path, model: nn.Module, config: PretrainedConfig) -> StoredWeights:
    """The weights of the checkpoint in `folder` for `model` (which may be empty). Raises ModelFileError when files are
    missing or damaged, or the tensors are not the model's."""
    found = _tensors(folder)
    shapes = {name: file.shapes[name] for name, file in found.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    _compare(folder, wanted, shapes)
    return StoredWeights({name: found[name] for name in wanted})


def fingerprint(folder: Path) -> str:
    """Equal for checkpoints of equal weights: a hash of the first row of each tensor. Raises ModelFileError."""
    stored, digest = open_checkpoint(folder), hashlib.sha256()
    for name in sorted(stored.files):
        row = stored.read(name, slice(0, 1)).contiguous()
        digest.update(f"{name} {row.dtype} {stored.files[name].shapes[name]}".encode())
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_checkpoint(folder: Path) -> StoredWeights:
    """Every tensor of the checkpoint in `folder`. Raises ModelFileError."""
    return StoredWeights(_tensors(folder))


def seeded_weights(model: nn.Module, config: PretrainedConfig, seed: int) -> SeededWeights:
    """For the parameters of `model`, which may be empty."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return SeededWeights(shapes, config.num_hidden_layers, seed)


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, seed: int) -> None:
    """Give every parameter of `model`, sharded or not, its first values. Adapters start as peft's do, A uniform and B
    zero, A a pure function of (seed, name); what is quantized is left as it is."""
    for wrapped, parameter in model.named_parameters():
        name = plain_name(wrapped)
        local, rows = _local(parameter)
        if ".lora_B." in name:
            local.zero_()
        elif ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            local.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)[rows])
        elif parameter.is_floating_point():
            local.copy_(weights.read(name.replace(".base_layer.", "."), rows))


def _local(parameter: Tensor) -> tuple[Tensor, slice]:
    """What this rank holds of a parameter, and which rows those are. FSDP cuts into equal rows, the last shares being
    shorter or empty."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, parameter.shape[0])
    local, mesh = parameter.to_local(), parameter.device_mesh
    start = 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            share = -(-parameter.shape[0] // mesh.size(dimension))
            start = min(mesh.get_local_rank(dimension) * share, parameter.shape[0])
    return local, slice(start, start + local.shape[0])


def _tensors(folder: Path) -> dict[str, OpenFile]:
    """Of each tensor the file that holds it. What old checkpoints store though it is computed is left out."""
    return {name: file for name, file in _all_tensors(folder).items() if not name.endswith(_COMPUTED)}


def _all_tensors(folder: Path) -> dict[str, OpenFile]:
    for index in _INDEXES:
        if (folder / index).is_file():
            return _indexed(folder, index)
    for single in _SINGLE:
        if (folder / single).is_file():
            file = _open(member(folder, single))
            return dict.fromkeys(file.shapes, file)
    hint = "give the folder of a Hugging Face checkpoint; other formats: `koala recover`"
    raise ModelFileError(f"{str(folder)!r} holds no {_SINGLE[0]}, no {_SINGLE[1]} and no index of several", hint)


def _indexed(folder: Path, index: str) -> dict[str, OpenFile]:
    files = read_object(folder / index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelFileError(f"{index} names no files (weight_map)", _DAMAGED)
    paths = {file: member(folder, file) for file in set(files.values())}
    opened = {file: _open(path) for file, path in paths.items()}
    found = {name: opened[file] for name, file in files.items()}
    if absent := [name for name, file in found.items() if name not in file.shapes]:
        raise ModelFileError(f"{found[absent[0]].path.name} has no {absent[0][:_SHOWN]}; {index} says so", _DAMAGED)
    return found


def _open(path: Path) -> OpenFile:
    """Raises ModelFileError. Pickles are read for tensors only; nothing in them is run."""
    try:
        return _opened(path)
    except FileNotFoundError:
        raise ModelFileError(f"{str(path)!r} is missing", _DAMAGED) from None
    except pickle.UnpicklingError:  # torch's words advise to run it
        raise ModelFileError(f"{path.name} cannot be read: it holds more than tensors", _DAMAGED) from None
    except Exception as error:  # torch and safetensors raise many kinds for files that are damaged
        raise ModelFileError(f"{path.name} cannot be read: {first_line(error, _SHOWN)}", _DAMAGED) from None


def _opened(path: Path) -> OpenFile:
    if path.suffix == ".safetensors":
        file: Any = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return OpenFile(path, shapes, lambda name, rows: file.get_slice(name)[rows])
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelFileError(f"{path.name} holds something else than named tensors", _DAMAGED)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return OpenFile(path, shapes, lambda name, rows: tensors[name][rows])


def _compare(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless names and shapes are the same."""
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    for names, how in ((missing, "lacks"), (unexpected, "has, unexpectedly,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            what = f"{str(folder)!r} {how} the tensor {min(names)[:_SHOWN]}{more}"
            raise ModelFileError(what, "config.json and the weights must be of one LLaMA or Mistral model")
    for name, shape in wanted.items():
        if found[name] != shape:
            what = f"{name} is {_shown(found[name])} in {str(folder)!r}, {_shown(shape)} by its config.json"
            raise ModelFileError(what, "config.json and the weights must be of one model")


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
