"""What a user means by a model: a path, an alias or a name on the hub, a registered name, "nano", or nothing at all.

Only what is here is found; nothing is downloaded. A model that has to be fetched first is a NotHereError.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from koala_local.errors import ModelFileError
from koala_local.models import cache, catalog, store
from koala_local.models import reference as references
from koala_local.models.reference import HubReference
from koala_local.wording import first_of

BUNDLED = store.BUNDLED
_SHOWN = 5  # names in a hint


class NotHereError(ModelFileError):
    """A model of the hub that is not in the cache."""

    def __init__(self, text: str, wanted: HubReference) -> None:
        meant = "" if text == str(wanted) else f" ({wanted})"
        super().__init__(f"{text!r}{meant} is a model on the Hugging Face hub that is not here", _pull_hint(text))
        self.wanted = wanted


def _pull_hint(text: str) -> str:
    return f"download it: koala pull {text}"


def resolve(reference: str | None, last_used: str | None) -> Path:
    """The absolute path of the model that `reference` means, a file or a checkpoint folder; without one, of the last
    used model that is still there, else of the bundled one. Raises NotHereError or another ModelFileError. Whether a
    file is a GGUF is for `read_header` to say."""
    if reference is None:
        last = Path(last_used) if last_used else None
        return last if last is not None and (_is_file(last) or is_checkpoint(last)) else _bundled()
    if reference == BUNDLED:
        return _bundled()
    path = expanded(reference)
    if has_model(path):
        return _only_model(path) if _models_in(path) else path
    if (wanted := hub_reference(reference)) is not None:
        found = cache.find(wanted)
        if found is None:
            raise NotHereError(reference, wanted)
        return found
    if not _is_folder(path) and (registered := store.find_registered(reference)):
        return registered
    return _only_model(path) if _is_folder(path) else _refuse(reference, path)


def has_model(path: Path) -> bool:
    """Whether there is a file, a checkpoint or a folder with .gguf files. It then wins over an alias or a repository of
    the same name."""
    return _is_file(path) or is_checkpoint(path) or bool(_models_in(path))


def hub_reference(reference: str) -> HubReference | None:
    """What `reference` names on the hub; None where it rather is a path, or nothing."""
    name, choice, _ = references.split(reference)
    if repository := catalog.repository(name):
        return references.parse(reference, repository)
    owner = expanded(reference.partition("/")[0])
    if choice is None and (name.lower().endswith(".gguf") or _is_folder(owner)):
        return None
    return references.parse(reference)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder in Hugging Face's layout, such as a GPTQ model."""
    return _is_folder(path) and not _models_in(path) and (path / "config.json").is_file()


def _bundled() -> Path:
    from koala_local.nano import MODEL_PATH

    return MODEL_PATH


def expanded(reference: str) -> Path:
    """The absolute path that `reference` is, when it is one."""
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
    except (OSError, ValueError):
        return []


def _only_model(folder: Path) -> Path:
    names = _models_in(folder)
    if len(names) == 1:
        return folder / names[0]
    if not names:
        raise ModelFileError(f"{str(folder)!r} is a folder without a .gguf file", "give the path of a .gguf file")
    raise ModelFileError(f"{str(folder)!r} is a folder with {len(names)} models", f"choose one: {_listed(names)}")


def _refuse(reference: str, path: Path) -> NoReturn:
    import difflib

    names = _models_in(path.parent)
    close = difflib.get_close_matches(path.name, names, n=_SHOWN, cutoff=0.5)
    if aliases := [] if close or "/" in reference else catalog.nearest(reference.partition(":")[0]):
        raise ModelFileError(f"there is no model {reference!r}", f"did you mean {_listed(aliases)}?")
    if close:
        hint = f"did you mean {_listed(close)}?"
    elif names:
        hint = f"models in that folder: {_listed(names)}"
    else:
        hint = f"give the path of a .gguf file, or {BUNDLED!r} for the model that comes with koala; see `koala list`"
    raise ModelFileError(f"{str(path)!r} does not exist", hint)


def _listed(names: list[str]) -> str:
    return first_of([repr(name) for name in names], _SHOWN)
