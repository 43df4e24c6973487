"""Where the arrays of an EasyLM stream lie, found in one pass that skips over their bytes.

The stream is msgpack objects one after the other, each `[[key, ..], bytes]`. The bytes are msgpack again, as flax
writes an array: an extension of type 1 around `[shape, type's name, bytes]`; an array over 1 GiB is a map of chunks
that have to be joined. Every length is checked against what is left of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from koala_local.errors import DAMAGED, ModelFileError

from .stored import MappedFile

_DEPTH = 8
_SMALL = 64  # entries of an array or a map; a key has up to 7 parts, a chunked array a few chunks
_TEXT = 256  # bytes of a key or a name
_NDARRAY = 1  # flax's extension type
# First byte: kind, and the bytes of the length that follows.
_BY_SIZE_OF_LENGTH = ((0xC4, "bin"), (0xC7, "ext"), (0xD9, "str"))
_SIZED = {
    **{first + power: (kind, 1 << power) for first, kind in _BY_SIZE_OF_LENGTH for power in range(3)},
    0xDC: ("array", 2),
    0xDD: ("array", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive numbers of an array: how many, and the byte of the file where they start."""

    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the stream: its shape, numpy's name of its type, and its numbers in C order."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


def arrays(file: MappedFile, item_bytes: dict[str, int]) -> Iterator[Array]:
    """Every array of the stream. `item_bytes` are the types that are read. Raises ModelFileError."""
    cursor = _Cursor(file)
    while cursor.at < len(file):
        cursor.expect("array", 2, "an entry of the stream")
        parts = cursor.expect("array", None, "a key")
        key = tuple(cursor.text("a part of a key") for _ in range(parts))
        cursor.what = "/".join(key)
        length = cursor.expect("bin", None, "the value")
        end = cursor.at + length
        array = _array(cursor, key, item_bytes)
        if cursor.at != end:
            cursor.fail(f"the value should end at byte {end}")
        yield array


def _array(cursor: _Cursor, key: tuple[str, ...], item_bytes: dict[str, int]) -> Array:
    if cursor.peek() != "map":
        shape, dtype, chunk = _ndarray(cursor, item_bytes)
        return Array(key, shape, dtype, (chunk,))
    found: dict[str, tuple[tuple[int, ...], str, tuple[Chunk, ...]]] = {}
    whole: tuple[int, ...] | None = None
    for _ in range(cursor.expect("map", None, "a chunked array")):
        match cursor.text("a chunked array's key"):
            case "__msgpack_chunked_array__":
                cursor.skip()
            case "shape":
                whole = tuple(cursor.integer() for _ in cursor.numbered())
            case "chunks":
                for number in cursor.numbered():
                    shape, dtype, chunk = _ndarray(cursor, item_bytes)
                    found[str(number)] = (shape, dtype, (chunk,))
            case other:
                cursor.fail(f"a chunked array has the unknown key {other!r}")
    types = {dtype for _, dtype, _ in found.values()}
    chunks = tuple(chunk for _, _, held in found.values() for chunk in held)
    if whole is None or len(types) != 1 or math.prod(whole) != sum(chunk.count for chunk in chunks):
        cursor.fail("the chunks do not make up the array")
    return Array(key, whole, types.pop(), chunks)


def _ndarray(cursor: _Cursor, item_bytes: dict[str, int]) -> tuple[tuple[int, ...], str, Chunk]:
    length = cursor.expect("ext", None, "an array")
    end = cursor.at + length
    cursor.expect("array", 3, "an array's description")
    shape = tuple(cursor.integer() for _ in range(cursor.expect("array", None, "a shape")))
    dtype = cursor.text("a type's name")
    if dtype not in item_bytes:
        cursor.fail(f"the type {dtype!r} is not read; known are {', '.join(item_bytes)}")
    data = cursor.expect("bin", None, "an array's numbers")
    count = math.prod(shape)
    if data != count * item_bytes[dtype]:
        cursor.fail(f"an array of the shape {shape} cannot have {data} bytes")
    chunk = Chunk(count, cursor.at)
    cursor.at += data
    if cursor.at != end:
        cursor.fail(f"the array should end at byte {end}")
    return shape, dtype, chunk


class _Cursor:
    """A position in an untrusted msgpack file. Every method checks first, and raises ModelFileError."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0
        self.what = "the first entry"

    def fail(self, reason: str) -> NoReturn:
        where = f"{self.file.name}: {self.what[:_TEXT]!r}"
        raise ModelFileError(f"{where}: {reason} (byte {self.at})", DAMAGED)

    def raw(self, count: int) -> bytes:
        if self.at + count > len(self.file):
            self.fail(f"{count} bytes should follow, but only {len(self.file) - self.at} are left in the file")
        self.at += count
        return self.file.data[self.at - count : self.at]

    def peek(self) -> str:
        kind, _ = self.head()
        self.at -= 1 if kind != "nothing" else 0
        return kind

    def head(self) -> tuple[str, int]:
        """Kind and first byte of the next object; the position is behind that byte."""
        byte = self.raw(1)[0]
        if byte in _SIZED:
            return _SIZED[byte][0], byte
        for low, high, kind in ((0x80, 0x8F, "map"), (0x90, 0x9F, "array"), (0xA0, 0xBF, "str"), (0, 0x7F, "int")):
            if low <= byte <= high:
                return kind, byte
        if byte in _FIXED_EXT:
            return "ext", byte
        return ("int" if byte in _UNSIGNED else "constant" if byte in (0xC0, 0xC2, 0xC3) else "other"), byte

    def expect(self, kind: str, size: int | None, what: str) -> int:
        """The length of the next object, which must be of this kind (and size), and must fit into the file."""
        found, byte = self.head()
        if found != kind:
            self.fail(f"{what} should be here, of the kind {kind}, but there is {found}")
        length = self.length(byte)
        if size not in (None, length) or (kind in ("array", "map") and length > _SMALL):
            self.fail(f"{what} has {length} parts")
        if kind == "ext":
            extension = self.raw(1)[0]
            if extension != _NDARRAY:
                self.fail(f"{what} is of the extension type {extension}, not {_NDARRAY}")
        if self.at + length > len(self.file):
            self.fail(f"{what} should take {length} bytes, but only {len(self.file) - self.at} are left in the file")
        return length

    def length(self, byte: int) -> int:
        """The length that the object's first byte says, or that follows it."""
        if byte in _SIZED:
            return int.from_bytes(self.raw(_SIZED[byte][1]), "big")
        return _FIXED_EXT.get(byte, byte & (0x1F if 0xA0 <= byte <= 0xBF else 0x0F))

    def text(self, what: str) -> str:
        kind = self.peek()
        length = self.expect("bin" if kind == "bin" else "str", None, what)
        if length > _TEXT:
            self.fail(f"{what} has {length} bytes")
        try:
            return self.raw(length).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def integer(self) -> int:
        kind, byte = self.head()
        if kind != "int":
            self.fail(f"a size should be here, but there is {kind}")
        return int.from_bytes(self.raw(_UNSIGNED[byte]), "big") if byte in _UNSIGNED else byte

    def numbered(self) -> Iterator[int]:
        """Step over the keys "0", "1", .. of a map; the caller reads each value."""
        for number in range(self.expect("map", None, "a numbered map")):
            if self.text("a number") != str(number):
                self.fail(f"entry {number} of a numbered map is missing")
            yield number

    def skip(self) -> None:
        """Pass over a constant, or over something empty."""
        kind, byte = self.head()
        if kind != "constant" and (kind not in ("array", "map") or self.length(byte)):
            self.fail(f"a constant should be here, but there is {kind}")
