"""Open a checkpoint, whatever it is: a Hugging Face folder, Meta's, EasyLM's stream, a GGUF.

Nothing large is read here. All names and shapes are checked against the configuration once, when it is opened.
"""

from __future__ import annotations

from pathlib import Path

from koala_local.errors import ModelFileError

from .architecture import Checkpoint
from .easylm import looks_like_stream, open_easylm
from .gguf import open_gguf_checkpoint
from .huggingface import open_folder, open_weights
from .meta import open_meta

_KNOWN = (
    "known are a Hugging Face folder (config.json and weights), Meta's (params.json and consolidated.00.pth), "
    "EasyLM's stream and a .gguf file"
)
_GGML_MAGICS = (b"GGUF", b"lmgg", b"fmgg", b"tjgg")  # the last three: before GGUF; refused in words that help


def open_checkpoint(path: Path, *, head_size: int | None = None) -> Checkpoint:
    """The checkpoint at `path`, a folder or a file, opened and checked; its tensors are read later, on demand.

    `head_size` is for EasyLM's stream only, which does not say it. Raises ModelFileError."""
    path = located(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.is_file():
            raise ModelFileError(f"{str(path)!r} does not exist", "check the path")
        return _open_file(path, head_size)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"{str(path)!r} cannot be read: {error.strerror}", "check its permissions")


def located(path: Path) -> Path:
    """The file that stands for a folder with one GGUF and no other checkpoint; any other path as it is. Raises
    ModelFileError for a folder with several."""
    try:
        if not path.is_dir() or (path / "config.json").exists() or list(path.glob("consolidated.*.pth")):
            return path
        ggufs = sorted(path.glob("*.gguf"))
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(ggufs) > 1:
        raise ModelFileError(f"{str(path)!r} holds {len(ggufs)} .gguf files", "give the path of one of them")
    return ggufs[0] if ggufs else path


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "config.json").exists():
        return open_folder(folder)
    if (folder / "params.json").exists() and (folder / "consolidated.00.pth").exists():
        return open_meta(folder)
    if list(folder.glob("consolidated.*.pth")):
        missing = "consolidated.00.pth" if (folder / "params.json").exists() else "params.json"
        raise ModelFileError(f"{missing} is missing from {str(folder)!r}", "download that file too")
    raise ModelFileError(f"{str(folder)!r} holds no checkpoint that is known", _KNOWN)


def _open_file(path: Path, head_size: int | None) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(4)
    if start in _GGML_MAGICS or path.suffix == ".gguf":
        return open_gguf_checkpoint(path)
    if path.suffix in (".safetensors", ".bin"):
        return open_weights(path)
    if path.suffix == ".pth" and (path.parent / "params.json").exists():
        return open_meta(path.parent)
    if looks_like_stream(start):
        return open_easylm(path, head_size)
    raise ModelFileError(f"{str(path)!r} is no checkpoint that is known", _KNOWN)
