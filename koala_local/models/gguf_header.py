"""The header of a GGUF file, read without trusting it: every size is checked before anything is read by it.

Layout, little-endian: magic, version, counts; key-value pairs; tensor table; padding; tensor data. llama.cpp reads the
same bytes in C++; what would make it abort and can be seen here is refused here. Spec: ggml's docs/gguf.md.
"""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, NoReturn

from koala_local.errors import DAMAGED, ModelFileError
from koala_local.models.file_kind import open_gguf
from koala_local.models.gguf_types import ARRAY, NO_KERNEL, SCALARS, STRING, TENSOR_TYPES

_HEADER_LIMIT = 32 << 20  # bytes; twice what 260 000 tokens and 500 000 merges take. Bounds the time a header can cost
_KEPT_ARRAY = 256  # elements; longer arrays (vocabularies) are checked and skipped
_NAME_LIMIT = 64  # bytes of a tensor's name in ggml, its final NUL included
_DIMENSIONS_LIMIT = 4
_SHOWN = 80  # characters of the file's text in an error
_ALIGNMENT_LIMIT = 1 << 20
_F32_ONLY = ("norm.weight", ".bias")  # multiplied or added elementwise: the kernel aborts on other types
_SAMPLES, _SAMPLE_BYTES = 64, 4096

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LongArray:
    """What is kept of an array of more than a few elements: the type of its elements and their number."""

    kind: str
    length: int


Scalar = str | int | float | bool
Value = Scalar | tuple[Scalar, ...] | LongArray


class Tensor(NamedTuple):
    """One entry of the tensor table. `shape` has the fastest dimension first; `offset` is the byte in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


class GgufHeader(NamedTuple):
    """What a GGUF file says about itself. Text in it comes from the file: not to be printed unfiltered."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int
    file_size: int
    fingerprint: str  # SHA-256 over the header, the file's size and evenly spaced samples of the data

    def __repr__(self) -> str:
        return f"GgufHeader({str(self.path)!r})"

    @property
    def architecture(self) -> str:
        return self._text("general.architecture") or ""

    @property
    def name(self) -> str:
        """The model's name, or that of its file where it has none."""
        return self._text("general.name") or self.path.stem

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template")

    @property
    def licence(self) -> str | None:
        return self._text("general.license") or self._text("general.license.name")

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was trained with, where the file says it."""
        length = self.metadata.get(f"{self.architecture}.context_length")
        return length if type(length) is int and length > 0 else None

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None


def read_header(path: Path) -> GgufHeader:
    """The checked header of the GGUF (version 2 or 3, little-endian) at `path`. Raises ModelFileError."""
    with open_gguf(path) as file, _mapped(path, file) as data:
        reader = _Reader(path, data)
        tensor_count, pair_count = _read_counts(reader)
        metadata = _read_metadata(reader, pair_count)
        table = [_read_tensor(reader) for _ in range(tensor_count)]
        start = _data_offset(reader, metadata)
        tensors = tuple(_placed(reader, tensor, start) for tensor in table)
        fingerprint = _fingerprint(data, start)
        header = GgufHeader(path, MappingProxyType(metadata), tensors, start, len(data), fingerprint)
    _check_computable(header)
    return header


def _mapped(path: Path, file: BinaryIO) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOMEM
        hint = "the memory of this program is limited: see `ulimit -v`" if full else "copy it to a local disk"
        raise ModelFileError(f"{str(path)!r} cannot be read: {error}", hint) from None


class _Reader:
    """A position in an untrusted file. Every method checks first, and raises ModelFileError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 4  # after the magic
        self.end = min(len(data), _HEADER_LIMIT)

    def fail(self, what: str, at: int | None = None, hint: str = DAMAGED) -> NoReturn:
        raise ModelFileError(f"{str(self.path)!r}: {what} (byte {self.at if at is None else at})", hint)

    def need(self, count: int, what: str) -> None:
        if self.at + count <= self.end:
            return
        if self.at + count <= len(self.data):
            self.fail(f"{what} ends past the {_HEADER_LIMIT >> 20} MiB that a header may take")
        self.fail(f"{what} should take {count} bytes, but only {len(self.data) - self.at} are left in the file")

    def number(self, form: struct.Struct, what: str) -> int:
        self.need(form.size, what)
        number: int = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return number

    def raw(self, what: str) -> bytes:
        length = self.number(_U64, f"the length of {what}")
        self.need(length, what)
        self.at += length
        return self.data[self.at - length : self.at]

    def name(self, what: str) -> str:
        start = self.at
        raw = self.raw(what)
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8", start)
        return name or self.fail(f"{what} is empty", start)

    def scalars(self, kind: int, count: int, what: str) -> tuple[Scalar, ...]:
        """`count` values of a kind that is in SCALARS, or strings."""
        if kind == STRING:
            return tuple(self.raw(what).decode(errors="replace") for _ in range(count))
        form = struct.Struct(f"<{count}{SCALARS[kind][1]}")
        self.need(form.size, what)
        self.at += form.size
        return form.unpack_from(self.data, self.at - form.size)

    def skip(self, kind: int, count: int, what: str) -> None:
        """Pass over `count` values, of which strings are checked one by one."""
        if kind != STRING:
            size = count * struct.calcsize(SCALARS[kind][1])
            self.need(size, what)
            self.at += size
            return
        data, at, left, last, length_at = self.data, self.at, count, self.end - 8, _U64.unpack_from
        while left and at <= last:  # half a million rounds for a large vocabulary: nothing is called that need not be
            at += 8 + length_at(data, at)[0]
            left -= 1
        if left or at > self.end:
            self.fail(f"a string in {what} reaches past the end of the file")
        self.at = at


def _read_counts(reader: _Reader) -> tuple[int, int]:
    version = reader.number(_U32, "the version")
    if version not in (2, 3):
        _refuse_version(reader, version)
    tensors = reader.number(_U64, "the number of tensors")
    pairs = reader.number(_U64, "the number of metadata entries")
    reader.need(tensors * 32 + pairs * 14, f"a header of {tensors} tensors and {pairs} metadata entries")
    return tensors, pairs


def _refuse_version(reader: _Reader, version: int) -> NoReturn:
    if version and version & 0xFFFF == 0:
        reader.fail("it is a big-endian GGUF; only little-endian ones are read", 4, "get the little-endian file")
    if version == 1:
        reader.fail("it is GGUF version 1, which nothing reads any more", 4, "get a GGUF of version 2 or 3")
    reader.fail(f"it says GGUF version {version}; versions 2 and 3 are known", 4)


def _read_metadata(reader: _Reader, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(count):
        start = reader.at
        key = reader.name(f"the name of metadata entry {number}")
        what = f"metadata entry {key[:_SHOWN]!r}"
        if key in metadata:
            reader.fail(f"{what} is there twice", start)
        metadata[key] = _read_value(reader, what)
    return metadata


def _read_value(reader: _Reader, what: str) -> Value:
    kind = reader.number(_U32, f"the type of {what}")
    if kind != ARRAY:
        _check_kind(reader, kind, what)
        return reader.scalars(kind, 1, what)[0]
    kind = reader.number(_U32, f"the element type of {what}")
    if kind == ARRAY:
        reader.fail(f"{what} is an array of arrays, which llama.cpp does not read", reader.at - 4)
    _check_kind(reader, kind, what)
    count = reader.number(_U64, f"the length of {what}")
    reader.need(count * (8 if kind == STRING else 1), f"{what}, an array of {count} elements,")
    if count <= _KEPT_ARRAY:
        return reader.scalars(kind, count, what)
    reader.skip(kind, count, what)
    return LongArray("string" if kind == STRING else SCALARS[kind][0], count)


def _check_kind(reader: _Reader, kind: int, what: str) -> None:
    if kind != STRING and kind not in SCALARS:
        reader.fail(f"{what} has the unknown type {kind}", reader.at - 4)


def _read_tensor(reader: _Reader) -> Tensor:
    """The next entry of the tensor table, its offset still counted from the start of the data."""
    start = reader.at
    name = reader.name("a tensor's name")
    what = f"tensor {name[:_NAME_LIMIT]!r}"
    if len(name.encode()) >= _NAME_LIMIT:
        reader.fail(f"the name of {what} is longer than {_NAME_LIMIT - 1} bytes", start)
    dimensions = reader.number(_U32, f"the number of dimensions of {what}")
    if not 1 <= dimensions <= _DIMENSIONS_LIMIT:
        reader.fail(f"{what} has {dimensions} dimensions; 1 to {_DIMENSIONS_LIMIT} are possible", reader.at - 4)
    shape = tuple(reader.number(_U64, f"the shape of {what}") for _ in range(dimensions))
    type_id = reader.number(_U32, f"the type of {what}")
    if type_id not in TENSOR_TYPES:
        reader.fail(f"{what} has the type {type_id}, which is unknown or was withdrawn", reader.at - 4)
    type_name, block, block_bytes = TENSOR_TYPES[type_id]
    if 0 in shape or shape[0] % block:
        reader.fail(f"{what} of type {type_name} cannot have the shape {shape}", start)
    size = math.prod(shape) // block * block_bytes
    return Tensor(name, type_name, shape, reader.number(_U64, f"the offset of {what}"), size)


def _data_offset(reader: _Reader, metadata: Mapping[str, Value]) -> int:
    """Where the data starts: after the tensor table, aligned."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _ALIGNMENT_LIMIT or alignment & (alignment - 1):
        reader.fail(f"the alignment, {str(alignment)[:_SHOWN]!r}, is no power of two up to {_ALIGNMENT_LIMIT}")
    return -(-reader.at // alignment) * alignment


def _placed(reader: _Reader, tensor: Tensor, data_offset: int) -> Tensor:
    """`tensor` with its offset counted from the start of the file, checked to lie inside it."""
    placed = tensor._replace(offset=data_offset + tensor.offset)
    if placed.offset + placed.size > len(reader.data):
        end = f"ends at byte {placed.offset + placed.size}, the file at byte {len(reader.data)}"
        reader.fail(f"tensor {tensor.name!r} {end}", placed.offset)
    return placed


def _fingerprint(data: mmap.mmap, data_offset: int) -> str:
    digest = hashlib.sha256(data[:data_offset])
    digest.update(_U64.pack(len(data)))
    data.madvise(mmap.MADV_RANDOM)  # reading ahead of every sample costs half a second on a file not yet cached
    last = max(data_offset, len(data) - _SAMPLE_BYTES)
    for number in range(_SAMPLES):
        start = data_offset + (last - data_offset) * number // (_SAMPLES - 1)
        digest.update(data[start : start + _SAMPLE_BYTES])
    return digest.hexdigest()


def _check_computable(header: GgufHeader) -> None:
    """Refuse what llama.cpp loads without a word, to abort while decoding."""
    for key, value in header.metadata.items():
        if key.endswith("_epsilon") and not (isinstance(value, float) and 0 <= value < math.inf):
            what = f"metadata entry {key[:_SHOWN]!r} cannot be {str(value)[:_SHOWN]!r}"
            raise ModelFileError(f"{str(header.path)!r}: {what}", DAMAGED)
    no_kernel = NO_KERNEL | {"I32"} if header.architecture == "llama" else NO_KERNEL
    for tensor in header.tensors:
        if tensor.type in no_kernel or (tensor.type != "F32" and tensor.name.endswith(_F32_ONLY)):
            what = f"tensor {tensor.name!r} is of type {tensor.type}, which llama.cpp cannot compute with there"
            raise ModelFileError(f"{str(header.path)!r}: {what}", DAMAGED)
