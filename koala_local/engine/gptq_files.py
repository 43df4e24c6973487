"""The files of a GPTQ folder, none of them trusted: configuration, quantization settings and tensors.

Read are safetensors only. Pickles, code that comes with a model and files outside the folder are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from koala_local.engine.gptq_layout import BITS, Layout
from koala_local.errors import ModelFileError

_JSON_LIMIT = 128 << 20  # bytes; the largest honest tokenizer.json takes some 20 MB
_LARGEST = 1 << 31
_SHOWN = 100
_DAMAGED = "the file is damaged or was not downloaded completely: download it again"
_ONLY = "known are GPTQ folders of LLaMA and Mistral models, as safetensors"
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # the class's name while it was being added to transformers
    "MistralForCausalLM": "mistral",
}
_SCALINGS = ("linear", "dynamic", "yarn", "llama3")
_TYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """config.json, checked; `rope` in transformers' words, with its rope_theta."""

    kind: str  # "llama" or "mistral"
    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    norm_epsilon: float
    rope: Mapping[str, Any]
    tied: bool
    window: int | None
    bos: int | None
    eos: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file, {} where there is none. Raises ModelFileError."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        text = file.read(_JSON_LIMIT + 1)
    try:
        found = json.loads(text) if len(text) <= _JSON_LIMIT else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path.name} holds no JSON object", _DAMAGED)
    return found


class _Values:
    """Values of an untrusted JSON object. All raise ModelFileError."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def fail(self, key: str) -> ModelFileError:
        return ModelFileError(f"{self.where}: {key!r} cannot be {repr(self.values.get(key))[:_SHOWN]}", _ONLY)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is int and 0 < value < _LARGEST:
            return value
        raise self.fail(key)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise self.fail(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        raise self.fail(key)

    def table(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None or isinstance(value, dict):
            return dict(value or {})
        raise self.fail(key)

    def ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(type(number) is int for number in ids):
            return tuple(number for number in ids if number >= 0)
        raise self.fail(key)


def read_model_settings(folder: Path) -> ModelSettings:
    """Raises ModelFileError for anything but a plain LLaMA or Mistral."""
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"{str(folder)!r} has no config.json", "give the folder of a GPTQ model")
    values = _Values(read_json(folder / "config.json"), "config.json")
    kind = _kind(values)
    heads, hidden = values.count("num_attention_heads"), values.count("hidden_size")
    kv_heads = values.count("num_key_value_heads", 8 if kind == "mistral" else heads)
    head_size = values.count("head_dim", hidden // heads or 1)
    if heads % kv_heads or (values.values.get("head_dim") is None and hidden % heads):
        raise values.fail("num_attention_heads")
    if head_size % 2:
        raise values.fail("head_dim")
    windowed = kind == "mistral" and values.values.get("sliding_window", 4096) is not None
    return ModelSettings(
        kind,
        vocabulary=values.count("vocab_size"),
        hidden=hidden,
        feed_forward=values.count("intermediate_size"),
        layers=values.count("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        context=values.count("max_position_embeddings", values.count("max_sequence_length", 2048)),
        norm_epsilon=values.number("rms_norm_eps", 1e-6),
        rope=MappingProxyType(_rope(values)),
        tied=values.flag("tie_word_embeddings"),
        window=values.count("sliding_window", 4096) if windowed else None,
        bos=next(iter(values.ids("bos_token_id")), None),
        eos=values.ids("eos_token_id"),
    )


def _kind(values: _Values) -> str:
    if values.values.get("auto_map"):
        what = "the model comes with code of its own (auto_map), which is never run"
        raise ModelFileError(f"config.json: {what}", _ONLY)
    for key in ("attention_bias", "mlp_bias"):
        if values.flag(key):
            raise values.fail(key)
    if values.values.get("hidden_act", "silu") != "silu":
        raise values.fail("hidden_act")
    named = values.values.get("architectures")
    first = named[0] if isinstance(named, list) and len(named) == 1 else named
    if first is None and values.values.get("model_type") in _ARCHITECTURES.values():
        return str(values.values["model_type"])
    if isinstance(first, str) and first in _ARCHITECTURES:
        return _ARCHITECTURES[first]
    raise ModelFileError(f"config.json: the architecture {str(first)[:_SHOWN]!r} is not supported", _ONLY)


def _rope(values: _Values) -> dict[str, Any]:
    found = {**values.table("rope_scaling"), **values.table("rope_parameters")}
    old = found.pop("type", None)
    kind = found.setdefault("rope_type", old or "default")
    found.setdefault("rope_theta", values.number("rope_theta", 10000.0))
    if kind not in ("default", *_SCALINGS) or not all(isinstance(value, int | float | str) for value in found.values()):
        raise values.fail("rope_scaling")
    return found


def read_layout(folder: Path) -> Layout:
    """From config.json's quantization_config, or the quantize_config.json of 2023. Raises ModelFileError."""
    where = "config.json's quantization_config"
    found = _Values(read_json(folder / "config.json"), "config.json").table("quantization_config")
    if not found:
        where, found = "quantize_config.json", read_json(folder / "quantize_config.json")
    if not found:
        raise ModelFileError(
            f"{str(folder)!r} says nowhere how it is quantized",
            "a GPTQ model has a quantize_config.json, or a quantization_config in config.json",
        )
    values = _Values(found, where)
    for key, known in (("quant_method", ("gptq",)), ("checkpoint_format", ("gptq",))):
        if found.get(key, known[0]) not in known:
            raise values.fail(key)
    if found.get("bits") not in BITS:
        raise values.fail("bits")
    size = found.get("group_size", -1)
    if type(size) is not int or not (size == -1 or 0 < size < _LARGEST):
        raise values.fail("group_size")
    if values.flag("lm_head"):
        raise values.fail("lm_head")
    return Layout(int(found["bits"]), size)


def _member(folder: Path, name: str) -> Path:
    """The file `name` of the folder. Raises ModelFileError when that is somewhere else, links followed; those from a
    snapshot of the hub's cache to its blobs are fine."""
    path = folder / name
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise ModelFileError(f"the model names the file {name[:_SHOWN]!r}, which is not in its folder", "do not use it")
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ModelFileError(f"{name[:_SHOWN]!r} is a link that leaves the model's folder", "do not use this model")
    return path


class TensorFiles:
    """The tensors of a folder's safetensors files, read one at a time; shapes and types are known beforehand."""

    def __init__(self, folder: Path) -> None:
        """Opens every file's header. Raises ModelFileError."""
        self._files: dict[str, Any] = {}  # by tensor
        digest = hashlib.sha256()
        for name in ("config.json", "quantize_config.json"):
            digest.update(json.dumps(read_json(folder / name)).encode())
        for path, wanted in _weight_files(folder).items():
            file = _open(path)
            names = set(file.keys())
            if wanted - names:
                raise ModelFileError(f"{path.name} does not hold {min(wanted - names)[:_SHOWN]!r}", _DAMAGED)
            self._files |= dict.fromkeys(wanted or names, file)
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode())
        self.fingerprint = digest.hexdigest()  # of the settings and of each file's size and time

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> torch.Tensor:
        """A tensor that must have this shape and one of these types. Raises ModelFileError."""
        part = self._slice(name)
        found = tuple(part.get_shape())
        if found != shape:
            raise ModelFileError(f"{name} has the shape {found}, config.json wants {shape}", _DAMAGED)
        if part.get_dtype() not in types:
            raise ModelFileError(f"{name} is {part.get_dtype()}, not {' or '.join(types)}", _DAMAGED)
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelFileError(f"{name} holds NaN or infinite values", _DAMAGED)
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ModelFileError(f"the model has no tensor {name}", "a file is missing, or it is another kind of model")
        return self._files[name].get_slice(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path.name} is no whole safetensors file: {str(error)[:_SHOWN]}", _DAMAGED) from None


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files with weights, and the tensors looked for in each; an empty set: all that it has."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = read_json(_member(folder, index.name)).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ModelFileError(f"{index.name} has no usable weight_map", _DAMAGED)
        wanted: dict[Path, set[str]] = {}
        for tensor, name in where.items():
            wanted.setdefault(_member(folder, name), set()).add(tensor)
        for path in wanted:
            if path.suffix != ".safetensors" or not path.is_file():
                raise ModelFileError(f"{path.name[:_SHOWN]!r} is missing or no safetensors file", "download it")
        return wanted
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:  # in 2023 it was often called gptq_model-4bit-128g.safetensors
        return {_member(folder, found[0].name): set()}
    if found:
        raise ModelFileError(
            f"{str(folder)!r} holds {len(found)} safetensors files and no index of them", "download it"
        )
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    if pickles:
        what = f"{pickles[0]} is a pickle, which can run code when it is read, and is not opened"
        raise ModelFileError(what, "get the model as safetensors")
    raise ModelFileError(f"{str(folder)!r} holds no safetensors file", "give the folder of a GPTQ model")
