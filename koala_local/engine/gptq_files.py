"""The files of a GPTQ folder, none of them trusted: configuration, quantization settings and tensors.

Read are safetensors only. Pickles, code that comes with a model and files outside the folder are refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from koala_local.engine.gptq_layout import BITS, Layout
from koala_local.errors import DAMAGED, ModelFileError
from koala_local.models.configuration import ModelConfig, read_configuration, read_quantization
from koala_local.models.json_file import member, read_optional

_LARGEST = 1 << 31
_SHOWN = 100


def read_model_settings(folder: Path) -> ModelConfig:
    """Raises ModelFileError for anything but a plain LLaMA or Mistral."""
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"{str(folder)!r} has no config.json", "give the folder of a GPTQ model")
    return read_configuration(folder / "config.json", quantized=True)


def read_layout(folder: Path) -> Layout:
    """From config.json's quantization_config, or the quantize_config.json of 2023. Raises ModelFileError."""
    values = read_quantization(folder)
    found = values.values
    if not found:
        raise ModelFileError(
            f"{str(folder)!r} says nowhere how it is quantized",
            "a GPTQ model has a quantize_config.json, or a quantization_config in config.json",
        )
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


class TensorFiles:
    """The tensors of a folder's safetensors files, read one at a time; shapes and types are known beforehand."""

    def __init__(self, folder: Path) -> None:
        """Opens every file's header. Raises ModelFileError."""
        self._files: dict[str, Any] = {}  # by tensor
        digest = hashlib.sha256()
        for name in ("config.json", "quantize_config.json"):
            digest.update(json.dumps(read_optional(folder / name)).encode())
        for path, wanted in _weight_files(folder).items():
            file = _open(path)
            names = set(file.keys())
            if wanted - names:
                raise ModelFileError(f"{path.name} does not hold {min(wanted - names)[:_SHOWN]!r}", DAMAGED)
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
            raise ModelFileError(f"{name} has the shape {found}, config.json wants {shape}", DAMAGED)
        if part.get_dtype() not in types:
            raise ModelFileError(f"{name} is {part.get_dtype()}, not {' or '.join(types)}", DAMAGED)
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelFileError(f"{name} holds NaN or infinite values", DAMAGED)
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ModelFileError(f"the model has no tensor {name}", "a file is missing, or it is another kind of model")
        return self._files[name].get_slice(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path.name} is no whole safetensors file: {str(error)[:_SHOWN]}", DAMAGED) from None


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files with weights, and the tensors looked for in each; an empty set: all that it has."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = read_optional(member(folder, index.name)).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ModelFileError(f"{index.name} has no usable weight_map", DAMAGED)
        wanted: dict[Path, set[str]] = {}
        for tensor, name in where.items():
            wanted.setdefault(member(folder, name), set()).add(tensor)
        for path in wanted:
            if path.suffix != ".safetensors" or not path.is_file():
                raise ModelFileError(f"{path.name[:_SHOWN]!r} is missing or no safetensors file", "download it")
        return wanted
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:  # in 2023 it was often called gptq_model-4bit-128g.safetensors
        return {member(folder, found[0].name): set()}
    if found:
        raise ModelFileError(
            f"{str(folder)!r} holds {len(found)} safetensors files and no index of them", "download it"
        )
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    if pickles:
        what = f"{pickles[0]} is a pickle, which can run code when it is read, and is not opened"
        raise ModelFileError(what, "get the model as safetensors")
    raise ModelFileError(f"{str(folder)!r} holds no safetensors file", "give the folder of a GPTQ model")
