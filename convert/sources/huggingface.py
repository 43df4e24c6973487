"""A Hugging Face folder: config.json, and weights as safetensors or pytorch_model*.bin, in one file or in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from koala_local.errors import ModelFileError
from koala_local.models.card import read_card
from koala_local.models.configuration import read_configuration
from koala_local.models.json_file import member, read_object

from ..vocabulary.tokenizer_files import has_tokenizer
from .layout import FileCheckpoint, assembled
from .pickled import open_pickled
from .safetensors_file import open_safetensors
from .stored import Stored

_SHOWN = 100
_OPENERS: Mapping[str, Callable[[Path], dict[str, Stored]]] = {".safetensors": open_safetensors, ".bin": open_pickled}
_SINGLE = ("model.safetensors", "pytorch_model.bin")  # safetensors first: a pickle is opened only where it has to be


def open_folder(folder: Path) -> FileCheckpoint:
    """The checkpoint in the folder. Raises ModelFileError."""
    config = member(folder, "config.json")
    for name in _SINGLE:
        if (folder / name).exists() or (folder / name).is_symlink():
            return _opened(config, [name], {})
        index = f"{name}.index.json"
        if (folder / index).exists() or (folder / index).is_symlink():
            where = _weight_map(folder, index)
            return _opened(config, list(dict.fromkeys(where.values())), where)
    if shards := [path.name for path in folder.iterdir() if path.suffix in _OPENERS and "-of-" in path.name]:
        what = f"{str(folder)!r} has shards ({sorted(shards)[0][:_SHOWN]!r}, ..) but not the index that lists them"
        raise ModelFileError(what, "get model.safetensors.index.json, or pytorch_model.bin.index.json, too")
    what = f"{str(folder)!r} has a config.json but no weights"
    raise ModelFileError(what, "model.safetensors or pytorch_model.bin should be there, or shards and their index")


def open_weights(path: Path) -> FileCheckpoint:
    """The checkpoint that lies whole in this one file, beside its config.json. Raises ModelFileError."""
    config = path.parent / "config.json"
    if not config.exists():
        raise ModelFileError(f"there is no config.json beside {str(path)!r}", "put the model's config.json there")
    return _opened(config, [path.name], {})


def _opened(config: Path, files: Sequence[str], where: Mapping[str, str]) -> FileCheckpoint:
    """The checkpoint in these files; `where` is the file of each tensor, as far as an index says it."""
    folder = config.parent
    card, settings = read_card(folder), read_configuration(config)
    settings = replace(settings, name=card.name or settings.name, licence=card.licence)
    paths = [member(folder, name) for name in files]  # all names are checked before any file is opened
    stored: dict[str, Stored] = {}
    for path in paths:
        _add(stored, _OPENERS[path.suffix](path))
    for name, file in where.items():
        if name not in stored or stored[name].origin != file:
            raise ModelFileError(
                f"the index says that {name[:_SHOWN]!r} is in {file}; it is not", "get all files again"
            )
    size = sum(path.stat().st_size for path in paths)
    kind = "safetensors" if paths[0].suffix == ".safetensors" else "PyTorch"
    description = f"{str(folder)!r} (Hugging Face, {kind}, {len(paths)} file{'s'[: len(paths) > 1]}, {size} bytes)"
    tokenizer = folder if has_tokenizer(folder) else None
    return assembled(settings, stored, tokenizer_folder=tokenizer, description=description)


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Which file holds each tensor. Every file is named plainly and is there; nothing has been opened but the index."""
    found = read_object(member(folder, index)).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ModelFileError(f"{index} has no weight_map from tensors to files", "get the index again")
    suffix = ".safetensors" if "safetensors" in index else ".bin"
    for file in dict.fromkeys(found.values()):
        path = member(folder, file)
        if path.suffix != suffix:
            raise ModelFileError(f"{index} names {file[:_SHOWN]!r}, which is no {suffix} file", "get the index again")
        if not path.is_file():
            missing = f"{file[:_SHOWN]!r}, which {index} names, is missing from {str(folder)!r}"
            raise ModelFileError(missing, "download that file too")
    return found


def _add(stored: dict[str, Stored], part: Mapping[str, Stored]) -> None:
    for name in part:
        if name in stored:
            what = f"{name[:_SHOWN]!r} is in {stored[name].origin} and in {part[name].origin}"
            raise ModelFileError(what, "the files must be of one model: get all again")
    stored.update(part)
