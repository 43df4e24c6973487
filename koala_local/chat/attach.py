"""A text file as part of a message."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from koala_local.engine.text_stream import plain
from koala_local.errors import KoalaError
from koala_local.paths import typed_path

LIMIT_BYTES = 1 << 20  # far more than any context holds


def attachment(reference: str) -> str:
    """The file's text between fences, with its name above. Raises KoalaError where it is no text, or too large."""
    path = typed_path(reference)
    text = _decode(path, _read(path))
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{plain(path.name)}:\n{fence}\n{text.rstrip()}\n{fence}"


def name_of(attached: str) -> str:
    """The file name of what `attachment` returned."""
    return attached.partition("\n")[0].removesuffix(":")


def _read(path: Path) -> bytes:
    shown = repr(str(path))
    if path.is_dir():
        raise KoalaError(f"{shown} is a folder", "attach one text file at a time")
    if path.exists() and not path.is_file():
        raise KoalaError(f"{shown} is no ordinary file", "save what it gives to a file first, then attach that")
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise KoalaError(f"{shown} cannot be read: {reason}", "is the path right? Tab completes file names") from None
    if len(data) > LIMIT_BYTES:
        raise KoalaError(f"{shown} is larger than {LIMIT_BYTES >> 20} MiB", "attach the part that matters")
    return data


def _decode(path: Path, data: bytes) -> str:
    shown = repr(str(path))
    if b"\0" in data:
        raise KoalaError(f"{shown} is a binary file", "only text can be attached")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "only text can be attached; other encodings: iconv -t utf-8"
        raise KoalaError(f"{shown} is not UTF-8 text (byte {error.start})", hint) from None
    if not text.strip():
        raise KoalaError(f"{shown} is empty")
    return text.replace("\r\n", "\n")
