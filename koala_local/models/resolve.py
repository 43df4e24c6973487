"""What a user means by a model: a path, a folder with one .gguf or a GPTQ model in it, "nano", or nothing at all."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NoReturn

from koala_local.errors import ModelFileError

BUNDLED = "nano"
_HUB_REFERENCE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<file>:.+)?")
_SHOWN = 5  # file names in a hint


def resolve(reference: str | None, last_used: str | None) -> Path:
    """The absolute path of the model file that `reference` means; without one, of the last used model that is still
    there, else of the bundled one. Raises ModelFileError. Whether the file is a GGUF is for `read_header` to say."""
    if reference is None:
        last = Path(last_used) if last_used else None
        return last if last is not None and (_is_file(last) or is_checkpoint(last)) else _bundled()
    if reference == BUNDLED:
        return _bundled()
    path = _expanded(reference)
    if _is_file(path):
        return path
    if is_checkpoint(path):
        return path
    return _only_model(path) if _is_folder(path) else _refuse(reference, path)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder in Hugging Face's layout, such as a GPTQ model."""
    return _is_folder(path) and not _models_in(path) and (path / "config.json").is_file()


def _bundled() -> Path:
    from koala_local.nano import MODEL_PATH

    return MODEL_PATH


def _expanded(reference: str) -> Path:
    try:
        return Path(reference).expanduser().absolute()
    except RuntimeError:  # ~nobody
        raise ModelFileError(f"there is no home folder for {reference!r}", "write the path out") from None


def _is_file(path: Path) -> bool:
    """Whether anything but a folder is there. Special files and unreadable ones get their own message when opened."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # a name too long, a folder that may not be looked into
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _models_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    except OSError:
        return []


def _only_model(folder: Path) -> Path:
    names = _models_in(folder)
    if len(names) == 1:
        return folder / names[0]
    if not names:
        raise ModelFileError(f"{str(folder)!r} is a folder without a .gguf file", "give the path of a .gguf file")
    raise ModelFileError(f"{str(folder)!r} is a folder with {len(names)} models", f"choose one: {_listed(names)}")


def _refuse(reference: str, path: Path) -> NoReturn:
    if _names_hub(reference):
        what = f"{reference!r} is the name of a model on the Hugging Face hub, not a file"
        raise ModelFileError(what, "download one of its .gguf files first, then give koala chat the path of that file")
    names = _models_in(path.parent)
    close = difflib.get_close_matches(path.name, names, n=_SHOWN, cutoff=0.5)
    if close:
        hint = f"did you mean {_listed(close)}?"
    elif names:
        hint = f"models in that folder: {_listed(names)}"
    else:
        hint = f"give the path of a .gguf file, or {BUNDLED!r} for the model that comes with koala"
    raise ModelFileError(f"{str(path)!r} does not exist", hint)


def _names_hub(reference: str) -> bool:
    """Whether a name of no existing file has the form `owner/repo` or `owner/repo:FILE`."""
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None:
        return False
    owner = _expanded(reference.partition("/")[0])
    return match["file"] is not None or not (reference.lower().endswith(".gguf") or _is_folder(owner))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
