"""The models that are here: the bundled one, those in the hub's cache, and files and folders that a user registered.

For each registered or used model there is one small file in the data folder, so that programs that run at the same time
never undo each other's notes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from koala_local.disk import write_whole
from koala_local.errors import KoalaError, ModelFileError
from koala_local.models import cache, catalog
from koala_local.models.gguf_header import read_header
from koala_local.models.quant_types import FILE_TYPES, type_in_name
from koala_local.models.shape import all_tensors
from koala_local.models.variants import UNQUANTIZED, File, Variant, variants
from koala_local.paths import data_folder, private_folder

BUNDLED = "nano"
Origin = Literal["bundled", "cache", "local"]


class Known(NamedTuple):
    """A model that is here. `reference` means it in every command; `path` is what is opened."""

    reference: str
    path: Path
    origin: Origin
    size: int | None  # bytes; None: it is gone
    type: str
    used: float | None = None  # seconds since 1970
    repository: str | None = None

    @property
    def runs(self) -> bool:
        """Whether chat can run it: it is there, and no unquantized checkpoint."""
        return self.size is not None and self.type not in UNQUANTIZED


class Details(NamedTuple):
    """What a model's own header adds. `problem`: why it cannot be read."""

    type: str
    context: int | None
    problem: str = ""


class _Note(NamedTuple):
    path: str
    registered: bool = False
    used: float | None = None


def known() -> list[Known]:
    """All models: the bundled one, then the registered, then the cached ones; each part by name."""
    found = [_bundled(), *_registered(), *_cached()]
    used = {note.path: note.used for note in _notes()}
    return [model._replace(used=used.get(str(model.path))) for model in found]


def details(model: Known) -> Details:
    """Read what the header or config.json says; a file that is damaged is no error here."""
    try:
        return _folder_details(model) if model.path.is_dir() else _file_details(model)
    except KoalaError as error:
        return Details(model.type, None, error.message)


def register(path: Path) -> list[Known]:
    """Remember a model file, or a folder of models, that lies where the user keeps it. Returns the models in it.
    Raises ModelFileError where there is none."""
    found = _models_at(path)
    if not found:
        what = f"{str(path)!r} holds neither a .gguf file nor a checkpoint"
        raise ModelFileError(what, "give the path of a .gguf file, or of a folder with config.json and safetensors")
    read = [model.path.is_dir() or bool(all_tensors(read_header(model.path))) for model in found]
    if not any(read):
        raise ModelFileError(f"{str(path)!r} holds a vocabulary, no weights", "take a model's own file")
    _write(_note(path)._replace(registered=True))
    paths = [model.path for model in found]
    return [model for model in _registered() if model.path in paths]


def unregister(path: Path) -> bool:
    """Forget a registered file or folder; it stays where it is. False where it was not registered."""
    note = _note(path)
    _file_of(path).unlink(missing_ok=True)
    return note.registered


def registered_paths() -> list[Path]:
    return sorted(Path(note.path) for note in _notes() if note.registered)


def find_registered(name: str) -> Path | None:
    """The registered model of that name. Raises ModelFileError when several have it."""
    found = [model.path for model in _registered() if name.lower() in (model.path.name.lower(), _name(model.path))]
    if len(found) > 1:
        paths = ", ".join(repr(str(path)) for path in found)
        raise ModelFileError(f"{name!r} names {len(found)} registered models", f"give the path of one: {paths}")
    return found[0] if found else None


def mark_used(path: Path) -> None:
    """Note that the model is used now. Does nothing where that cannot be written: no chat hangs on it."""
    with suppress(OSError):
        _write(_note(path)._replace(used=time.time()))


def forget(path: Path) -> None:
    """Drop what is noted of a model that was removed."""
    _file_of(path).unlink(missing_ok=True)


def _bundled() -> Known:
    from koala_local.nano import MODEL_PATH

    return Known(BUNDLED, MODEL_PATH, "bundled", MODEL_PATH.stat().st_size, type_in_name(MODEL_PATH.stem.upper()))


def _registered() -> list[Known]:
    found = []
    for path in registered_paths():
        found += _models_at(path) or [Known(_name(path), path, "local", None, "")]
    found = list({model.path: model for model in found}.values())  # a file may be registered with its folder, too
    names = Counter(model.reference for model in found) + Counter([BUNDLED, *catalog.ALIASES])
    return [model if names[model.reference] == 1 else model._replace(reference=str(model.path)) for model in found]


def _models_at(path: Path) -> list[Known]:
    """The models at `path`: the file itself, the checkpoint's folder itself, or the .gguf files directly in it."""
    try:
        if path.is_file():
            return [Known(_name(path), path, "local", path.stat().st_size, type_in_name(path.name))]
        files = [File(entry.name, entry.stat().st_size) for entry in path.iterdir() if entry.is_file()]
    except OSError:
        return []
    found = variants(files, method=cache.method_of(path))
    return [Known(_name(path / v.name), path / v.name, "local", v.size, v.type) for v in found]


def _name(path: Path) -> str:
    return (path.stem if path.suffix.lower() == ".gguf" else path.name).lower()


def _cached() -> list[Known]:
    found: dict[str, Known] = {}
    for repository in cache.repositories():
        for snapshot in cache.snapshots(repository):
            for variant in cache.variants_in(snapshot):
                if variant.type not in UNQUANTIZED or _is_readable(snapshot):
                    model = _cached_model(repository, snapshot, variant)
                    if model.reference in found:  # an older commit's
                        model = model._replace(reference=f"{model.reference}@{snapshot.name}")
                    found[model.reference] = model
    return list(found.values())


def _cached_model(repository: str, snapshot: Path, variant: Variant) -> Known:
    short = catalog.alias_of(repository) or repository
    reference = short if variant.is_folder else f"{short}:{variant.choice}"
    return Known(reference, snapshot / variant.name, "cache", variant.size, variant.type, repository=repository)


def _is_readable(folder: Path) -> bool:
    """Whether `koala quantize` reads this checkpoint: the cache holds those of other programs, too."""
    from koala_local.models.configuration import read_configuration

    try:
        return bool(read_configuration(folder / "config.json"))
    except KoalaError:
        return False


def _file_details(model: Known) -> Details:
    header = read_header(model.path)
    number = header.metadata.get("general.file_type")
    named = FILE_TYPES.get(number, "") if type(number) is int else ""
    return Details(model.type or named, header.context_length)


def _folder_details(model: Known) -> Details:
    from koala_local.models.configuration import read_configuration, read_quantization

    bits = read_quantization(model.path).values.get("bits")
    context = read_configuration(model.path / "config.json", quantized=True).context
    return Details(f"GPTQ {bits} bits" if type(bits) is int else model.type, context)


def _folder() -> Path:
    return data_folder() / "models"


def _file_of(path: Path) -> Path:
    return _folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _note(path: Path) -> _Note:
    return _read(_file_of(path)) or _Note(str(path))


def _notes() -> list[_Note]:
    try:
        files = sorted(_folder().glob("*.json"))
    except OSError:
        return []
    return [note for file in files if (note := _read(file))]


def _read(file: Path) -> _Note | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        path, used = found["path"], found.get("used")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(path, str) or not isinstance(used, int | float | None):
        return None
    return _Note(path, found.get("registered") is True, used)


def _write(note: _Note) -> None:
    file = _file_of(Path(note.path))
    private_folder(file.parent)
    content = {"path": note.path, "registered": note.registered, "used": note.used}
    write_whole(file, [json.dumps(content).encode()])
