"""JSON that comes with a model, and the files that it names: both untrusted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from koala_local.errors import DAMAGED, ModelFileError

_LIMIT = 128 << 20  # bytes; the largest honest tokenizer.json takes some 20 MB
_SHOWN = 120


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises ModelFileError: not JSON, no object, NaN, or a key that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ModelFileError(f"{where} names {twice[:_SHOWN]!r} twice", DAMAGED)
        return found

    def refuse(constant: str) -> NoReturn:
        raise ModelFileError(f"{where} holds {constant}, which is no number", DAMAGED)

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{where} is not valid JSON: {str(error)[:_SHOWN]}", DAMAGED) from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{where} holds no JSON object", DAMAGED)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises ModelFileError."""
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT + 1)
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} cannot be read: {error.strerror}", "check the folder") from None
    if len(text) > _LIMIT:
        raise ModelFileError(f"{str(path)!r} is larger than {_LIMIT >> 20} MiB", DAMAGED)
    return parse_object(text, repr(str(path)))


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in the file, {} where there is no such file. Raises ModelFileError."""
    return read_object(path) if path.is_file() else {}


def member(folder: Path, name: str) -> Path:
    """The file `name` of the folder. Raises ModelFileError, before anything is opened, when that leads elsewhere.

    A link is followed inside the folder, and from a snapshot of the hub's cache to its blobs."""
    plain = name not in ("", ".", "..") and "\0" not in name and Path(name).name == name and "\\" not in name
    if not plain:
        hint = "do not use this model: its files should all lie in one folder"
        raise ModelFileError(f"{str(folder)!r} names the file {name[:_SHOWN]!r}, which is not in the folder", hint)
    path = folder / name
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(target.is_relative_to(place) for place in allowed):
            hint = "copy the file into the folder if you trust it"
            raise ModelFileError(f"{str(path)!r} is a link to {str(target)!r}, outside the folder", hint)
    return path
