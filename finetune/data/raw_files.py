"""Rows of raw data files: JSON Lines, one JSON array, or Parquet; each plain or packed with gzip or xz.

What a file is, is told by its content. JSON is read in a stream: memory is bounded by `LONGEST` rows, not by the file.
Files come from strangers, so every length is bounded, and a row that is broken costs that row only:

    rows(Path("all.jsonl.gz"))  ->  ("all.jsonl:1", {..}), Skipped("all.jsonl:2", "not valid JSON"), ..

Lines are counted from 1 ("all.jsonl:17"), elements of an array and rows of a table from 0 ("alpaca_data.json[17]").
Of keys that an object has twice, the last counts.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from koala_local.errors import KoalaError
from koala_local.wording import first_line

LONGEST = 16 << 20  # bytes of one row as JSON
SUFFIXES = (".json", ".jsonl", ".parquet")
PACKED = (".gz", ".xz")
_CHUNK = 1 << 20
_LARGEST_RATIO, _SMALL = 200, 256 << 20  # text packs 3 to 20 times; what is small may have any ratio
_DEEPEST = 100_000  # brackets in each other; Python parses no more than about 1000
_TABLE_ROWS = 64  # that are held at a time
_BOM = b"\xef\xbb\xbf"
_OTHER_KINDS = {b"BZh": "bzip2", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xff\xfe": "UTF-16 text"}
_OTHER_KINDS |= {b"\xfe\xff": "UTF-16 text", b"ARROW1": "Arrow"}
_DAMAGED = "the file is damaged: download it again"
_READ = "JSON Lines, a JSON array and Parquet are read, plain or packed with gzip or xz"

# From anywhere outside a string: whole strings and what has no structure, then a bracket (between elements: or a comma)
# or the quote of a string that has no end yet. Possessive: linear in time, without a stack.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BETWEEN = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb')*+(["\[\]{},])', re.DOTALL)
_INSIDE = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb')*+(["\[\]{}])', re.DOTALL)


class RawFileError(KoalaError):
    """A raw file that cannot be read, or not to its end."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A raw row, or one of its dialogues, that cannot be used. `reason` is one of few texts: they are counted."""

    row: str  # "all.jsonl:17"
    reason: str  # "not valid JSON"


Row = tuple[str, Any]


def rows(path: Path, label: str = "") -> Iterator[Row | Skipped]:
    """Each row of the file with its name, which begins with `label`, else with the file's name as unpacked.
    Raises RawFileError."""
    label = label or unpacked_name(path.name)
    if not path.is_file():
        raise RawFileError(f"{str(path)!r} {'is no file' if path.exists() else 'does not exist'}", "check the path")
    try:
        with path.open("rb") as file, _unpacked(file) as unpacked:
            yield from _rows(_Bounded(path, unpacked), label)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise RawFileError(f"{str(path)!r} cannot be unpacked: {error}", _DAMAGED) from None
    except OSError as error:
        raise RawFileError(f"{str(path)!r} cannot be read: {error.strerror or error}", "check the file") from None


def unpacked_name(name: str) -> str:
    """`name` without .gz or .xz."""
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix in PACKED else name


class _Bounded:
    """An unpacked file that is not let grow past what text packs to."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.packed = isinstance(file, gzip.GzipFile | lzma.LZMAFile)
        self._file = file
        self._most = max(_SMALL, path.stat().st_size * _LARGEST_RATIO)
        self._read = 0

    def head(self, size: int) -> bytes:
        """The next bytes, at least one unless the file is at its end; they are still to be read."""
        return self._file.peek(size)[:size]  # type: ignore[attr-defined, no-any-return]

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(size))

    def line(self, size: int) -> bytes:
        """A line with its end, or the first `size` bytes of it."""
        return self._counted(self._file.readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._read += len(data)
        if self._read > self._most:
            what = f"{str(self.path)!r} unpacks to more than {_LARGEST_RATIO} times its size"
            raise RawFileError(what, "that is no text: do not use this file")
        return data


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if magic == b"\xfd7zXZ\0":
        return lzma.LZMAFile(file)
    return file


def _rows(file: _Bounded, label: str) -> Iterator[Row | Skipped]:
    magic = file.head(6)
    for start, kind in _OTHER_KINDS.items():
        if magic.startswith(start):
            raise RawFileError(f"{str(file.path)!r} is {kind}, which is not read", _READ)
    if magic.startswith(b"PAR1"):
        yield from _table(file, label)
        return
    if magic.startswith(_BOM):
        file.read(len(_BOM))
    line = 1
    while blank := _blank_start(file.head(_CHUNK)):
        line += file.read(blank).count(b"\n")
    yield from _elements(file, label) if file.head(1) == b"[" else _lines(file, label, line)


def _blank_start(data: bytes) -> int:
    return len(data) - len(data.lstrip())


def _parsed(name: str, text: bytes) -> Row | Skipped:
    try:
        return name, json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        return Skipped(name, "not valid UTF-8")
    except (ValueError, RecursionError):
        return Skipped(name, "not valid JSON")


def _lines(file: _Bounded, label: str, number: int) -> Iterator[Row | Skipped]:
    while line := file.line(LONGEST + 1):
        if len(line) > LONGEST:
            yield Skipped(f"{label}:{number}", "too long")
            while line and not line.endswith(b"\n"):
                line = file.line(LONGEST)
        elif not line.isspace():
            yield _parsed(f"{label}:{number}", line)
        number += 1


def _elements(file: _Bounded, label: str) -> Iterator[Row | Skipped]:
    """The elements of a JSON array. Where they begin and end is found without parsing them, so a broken one is one."""
    file.read(1)  # the bracket
    buffer, scanned, depth, number = b"", 0, 0, 0
    while True:
        start = 0
        while (found := (_INSIDE if depth else _BETWEEN).match(buffer, scanned)) and (byte := found[1]) != b'"':
            scanned = found.end()
            if depth == 0 and byte in b",]":
                element = buffer[start : scanned - 1]
                if byte == b"," or number or element.strip():
                    yield _parsed(f"{label}[{number}]", element)
                if byte == b"]":
                    _check_end(file, buffer[scanned:])
                    return
                start, number = scanned, number + 1
            else:
                depth = depth + 1 if byte in b"[{" else max(0, depth - 1)
        scanned = (found.start(1) if found else len(buffer)) - start
        buffer = buffer[start:]
        if len(buffer) > LONGEST or depth > _DEEPEST:
            bound = f"longer than {LONGEST >> 20} MiB" if depth <= _DEEPEST else f"more than {_DEEPEST} brackets deep"
            what = f"{str(file.path)!r}: element {number} of the array is {bound}"
            raise RawFileError(what, "a quote or bracket before it has no end: write one JSON object a line instead")
        more = file.read(max(_CHUNK, len(buffer)))
        if not more:
            raise RawFileError(f"{str(file.path)!r} ends inside element {number} of its array", _DAMAGED)
        buffer += more


def _check_end(file: _Bounded, rest: bytes) -> None:
    """Nothing follows an array but white space: a second one would be lost in silence."""
    while rest or (rest := file.read(_CHUNK)):
        if not rest.isspace():
            raise RawFileError(f"{str(file.path)!r} goes on behind the end of its array", _READ)
        rest = b""


def _table(file: _Bounded, label: str) -> Iterator[Row | Skipped]:
    """The rows of a Parquet file; a packed one is unpacked to a temporary file first, since it is read from its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as copy:
        source: Any = file.path
        if file.packed:
            while data := file.read(_CHUNK):
                copy.write(data)
            source = copy
        try:
            number = 0
            for batch in pq.ParquetFile(source).iter_batches(batch_size=_TABLE_ROWS):
                for offset in range(batch.num_rows):
                    yield _table_row(f"{label}[{number + offset}]", batch, offset)
                number += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            what = f"{str(file.path)!r} cannot be read as Parquet: {first_line(error)}"
            raise RawFileError(what, _DAMAGED) from None


def _table_row(name: str, batch: Any, offset: int) -> Row | Skipped:
    try:
        return name, batch.slice(offset, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Skipped(name, "not valid UTF-8")
