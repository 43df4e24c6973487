"""Open a file that should be a GGUF, and say what it is when it is something else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from koala_local.errors import ModelFileError

_MAGIC = b"GGUF"
_START = 512  # bytes looked at
_GET_GGUF = "get the model as a .gguf file"
_MAKE_GGUF = "get the model as a .gguf file, or make one: koala quantize FOLDER --bits 4"
_AGAIN = "give the path of a .gguf model file"
_OLD = "in the old {} format (.ggml, .ggmlv3), which llama.cpp no longer reads"
_CONVERTED = "get the model as GGUF; Koala 13B is in mradermacher/koala-13B-HF-GGUF on the Hugging Face hub"
_KINDS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (  # first bytes in lower case: what, what to do
    ((b"lmgg",), _OLD.format("ggml"), _CONVERTED),  # the old magics lie backwards on the disk
    ((b"fmgg",), _OLD.format("ggmf"), _CONVERTED),
    ((b"tjgg",), _OLD.format("ggjt"), _CONVERTED),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the model itself", "fetch the model with `git lfs pull`"),
    ((b"<!doctype", b"<html", b"<?xml"), "a web page, not a model", _AGAIN),
    ((b"pk\x03\x04",), "a zip archive, perhaps a PyTorch checkpoint, not a GGUF", _MAKE_GGUF),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04"), "a Python pickle, perhaps a PyTorch checkpoint, not a GGUF", _MAKE_GGUF),
    ((b"\0" * _START,), "full of zeros at its start: a download that was never completed", _AGAIN),
)


def open_gguf(path: Path) -> BinaryIO:
    """`path` opened for reading; its first bytes said GGUF. Raises ModelFileError that names what else it is."""
    shown = repr(str(path))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(f"{shown} is a folder", "give the path of a .gguf file inside it")
        if not stat.S_ISREG(mode):
            raise ModelFileError(f"{shown} is not a regular file", _GET_GGUF)
        file = path.open("rb")
    except FileNotFoundError:
        raise ModelFileError(f"{shown} does not exist", "check the path") from None
    except OSError as error:
        raise ModelFileError(f"{shown} cannot be read: {error.strerror}", "check its path and permissions") from None
    except ValueError:
        raise ModelFileError(f"{shown} cannot be the name of a file", "check the path") from None
    try:
        _refuse_others(shown, file)
    except BaseException:
        file.close()
        raise
    return file


def is_gguf(path: Path) -> bool:
    """Whether the file `path` calls itself a GGUF. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _refuse_others(shown: str, file: BinaryIO) -> None:
    try:
        start = file.read(_START)
    except OSError as error:
        raise ModelFileError(f"{shown} cannot be read: {error.strerror}", "check the disk that it is on") from None
    if start[:4] != _MAGIC:
        kind, hint = _kind(start, os.fstat(file.fileno()).st_size)
        raise ModelFileError(f"{shown} is {kind}", hint)


def _kind(start: bytes, size: int) -> tuple[str, str]:
    """What a file that starts like this is, and what to do about it."""
    if not start:
        return "empty", _AGAIN
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "a safetensors checkpoint, not a GGUF", _MAKE_GGUF
    lowered = start.lstrip().lower()
    for prefixes, kind, hint in _KINDS:
        if lowered.startswith(prefixes):
            return kind, hint
    if start.isascii() and " ".join(start.decode("ascii").split()).isprintable():
        return f"a text file, not a model: it starts with {start[:40].decode('ascii')!r}", _AGAIN
    return f"not a GGUF file: it starts with {start[:4]!r}", _GET_GGUF
