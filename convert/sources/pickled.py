"""Tensors of a `torch.save` file, mapped into memory, by torch's loader that runs no code (`weights_only`)."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from koala_local.errors import DAMAGED, ModelFileError
from koala_local.wording import first_line

from .stored import TYPE_NAMES, Stored

_PICKLE_LIMIT = 64 << 20  # bytes of the description of the tensors; a real one has some 100 KB
_SHOWN = 200
_HINT = "get the model as safetensors"


def open_pickled(path: Path) -> dict[str, Stored]:
    """Every tensor of the file, by name; nothing large is read yet. Raises ModelFileError."""
    _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]{1,60})", str(error))  # torch's own text advises to load it all the same
        named = f": it asks for {asked[1]}" if asked else ""
        raise ModelFileError(f"{path.name} holds more than tensors, and was not loaded{named}", _HINT) from None
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{path.name} cannot be read: {first_line(error)}", DAMAGED) from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path.name} holds a {type(found).__name__} instead of named tensors", _HINT)
    return {name: _stored(path, name, tensor) for name, tensor in found.items()}


def _check_archive(path: Path) -> None:
    """Raise ModelFileError unless the file is a zip archive of uncompressed entries, as torch writes them."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                start = file.read(2)
            _refuse(path, start)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except FileNotFoundError:
        raise ModelFileError(f"{str(path)!r} is missing", "check the path, or download it again") from None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelFileError(f"{path.name} cannot be read: {error}", DAMAGED) from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ModelFileError(f"{path.name} has compressed entries, which torch never writes", _HINT)
        if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_LIMIT:
            raise ModelFileError(f"{path.name} describes its tensors in {entry.file_size} bytes", DAMAGED)


def _refuse(path: Path, start: bytes) -> None:
    if start[:1] == b"\x80":
        what = f"{path.name} is a pickle in the format of torch before 1.6, which cannot be read safely"
        raise ModelFileError(what, "get the model as safetensors, or load and save it once with a newer torch")
    if start == b"PK":
        raise ModelFileError(f"{path.name} is cut off: its table of contents, at its end, is missing", DAMAGED)
    raise ModelFileError(f"{path.name} is no file that torch saved", DAMAGED)


def _stored(path: Path, name: Any, tensor: Any) -> Stored:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        what = f"{path.name} holds {str(name)[:_SHOWN]!r}: {type(tensor).__name__}, which is no tensor"
        raise ModelFileError(what, _HINT)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ModelFileError(f"{path.name} holds {name[:_SHOWN]!r} in a form that is not read", _HINT)
    plain = tensor.detach()

    def read(start: int, stop: int) -> torch.Tensor:
        return plain[start:stop].clone(memory_format=torch.contiguous_format)

    return Stored(tuple(plain.shape), TYPE_NAMES.get(plain.dtype, str(plain.dtype)), read, path.name)
