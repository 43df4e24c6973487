from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from koala_local.errors import ModelFileError
from koala_local.models.gguf_header import LongArray, read_header
from koala_local.models.gguf_types import TENSOR_TYPES
from tests.gguf_maker import CONTROL, make_model

TYPES = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
STRING, ARRAY, UINT32, FLOAT32 = 8, 9, 4, 6


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes | str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def container(
    pairs: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (),
    *,
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF by hand, with `data` bytes behind its header."""
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("header") / "some-file.gguf"
    return make_model(path, name="Tiny", context=256, chat_template="{{ x }}", extra_tokens=[("<|end|>", CONTROL)])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def written(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return written


def refusal(path: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    error = caught.value
    assert error.message.isprintable()
    assert error.hint.isprintable()
    assert error.hint
    assert len(error.message) < 500 + len(str(path))
    return error


def test_reads_what_a_chat_needs(model: Path) -> None:
    header = read_header(model)
    assert (header.architecture, header.name, header.context_length) == ("llama", "Tiny", 256)
    assert (header.chat_template, header.licence) == ("{{ x }}", None)
    assert header.file_size == model.stat().st_size
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert isinstance(tokens := header.metadata["tokenizer.ggml.tokens"], LongArray)
    assert tokens.kind == "string"


def test_tensors_lie_where_the_gguf_package_finds_them(model: Path) -> None:
    reader, header = gguf.GGUFReader(model), read_header(model)
    expected = [
        (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]
    assert [(t.name, t.type, t.shape, t.offset, t.size) for t in header.tensors] == expected
    assert header.data_offset == reader.data_offset


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    expected = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert expected == TENSOR_TYPES


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "kinds.gguf", "llama")
    writer.add_uint8("a", 200)
    writer.add_int8("b", -100)
    writer.add_uint16("c", 60000)
    writer.add_int16("d", -30000)
    writer.add_int32("e", -(2**31))
    writer.add_uint64("f", 2**63)
    writer.add_int64("g", -(2**63))
    writer.add_float64("h", 0.1)
    writer.add_bool("i", False)
    writer.add_array("j", ["one", "zwei", "三"])
    writer.add_array("k", [1, 2, 3])
    writer.add_string("general.license", "apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "kinds.gguf")
    values = [200, -100, 60000, -30000, -(2**31), 2**63, -(2**63), 0.1, False, ("one", "zwei", "三"), (1, 2, 3)]
    assert [header.metadata[key] for key in "abcdefghijk"] == values
    assert (header.name, header.licence, header.context_length) == ("kinds", "apache-2.0", None)


def test_a_file_may_have_any_extension(model: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copy(model, tmp_path / "model.txt"))
    assert read_header(renamed).tensors == read_header(model).tensors


def test_the_fingerprint_tells_files_apart(model: Path, write: Callable[[bytes], Path]) -> None:
    original, content = read_header(model), model.read_bytes()
    assert read_header(write(content)).fingerprint == original.fingerprint
    assert read_header(write(content + b"\0")).fingerprint != original.fingerprint
    for at in (content.index(b"Tiny"), original.data_offset, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        assert read_header(write(bytes(changed))).fingerprint != original.fingerprint
    zeros = [read_header(write(container(data=length))).fingerprint for length in (2**20, 2**20 + 1)]
    assert zeros[0] != zeros[1]


def test_a_vocabulary_of_32000_takes_less_than_a_tenth_of_a_second(write: Callable[[bytes], Path]) -> None:
    words = struct.pack("<IQ", STRING, 32_000) + b"".join(text(f"word{number}") for number in range(32_000))
    scores = struct.pack("<IQ", FLOAT32, 32_000) + bytes(4 * 32_000)
    path = write(container((ARCHITECTURE, pair("words", ARRAY, words), pair("scores", ARRAY, scores))))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        header = read_header(path)
        times.append(time.perf_counter() - start)
    assert header.metadata["words"] == LongArray("string", 32_000)
    assert min(times) < 0.1


SAFETENSORS = struct.pack("<Q", 2) + b"{}"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"lmgg" + bytes(100), "old ggml format"),
        (b"fmgg\1\0\0\0" + bytes(100), "old ggmf format"),
        (b"tjgg\3\0\0\0" + bytes(100), "old ggjt format"),
        (SAFETENSORS, "safetensors"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"Entry not found", "'Entry not found'"),
        (bytes(1000), "zeros"),
        (b"\x1b]52;c;AAAA\x07", "not a GGUF"),
        (b"GGU", "'GGU'"),
        (b"GGUF", "the version"),
    ],
)
def test_other_files_are_named_for_what_they_are(write: Callable[[bytes], Path], content: bytes, kind: str) -> None:
    path = write(content)
    error = refusal(path)
    assert kind in error.message
    assert repr(str(path)) in error.message


def test_old_formats_come_with_the_way_out(write: Callable[[bytes], Path]) -> None:
    assert "mradermacher/koala-13B-HF-GGUF" in refusal(write(b"tjgg\3\0\0\0")).hint


def test_paths_that_are_no_file(tmp_path: Path, model: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, what in [
        (tmp_path / "missing.gguf", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "loop", "cannot be read"),
        (model / "below", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("nul\0byte"), "cannot be the name"),
        (tmp_path / "\x1b[31mred", "does not exist"),
    ]:
        assert what in refusal(path).message


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_an_unreadable_file(model: Path, tmp_path: Path) -> None:
    locked = Path(shutil.copy(model, tmp_path / "locked.gguf"))
    locked.chmod(0)
    assert "Permission denied" in refusal(locked).message


@pytest.mark.parametrize(
    ("version", "what"),
    [(0, "version 0"), (1, "version 1"), (4, "version 4"), (3 << 24, "big-endian"), (2**32 - 1, "")],
)
def test_other_versions(write: Callable[[bytes], Path], version: int, what: str) -> None:
    assert what in refusal(write(container(version=version))).message


def test_version_2_is_read(write: Callable[[bytes], Path]) -> None:
    assert read_header(write(container(version=2))).architecture == "llama"


def test_every_shorter_file_is_refused(model: Path, write: Callable[[bytes], Path]) -> None:
    content, offset = model.read_bytes(), read_header(model).data_offset
    for length in [*range(0, offset, 61), offset, len(content) - 1]:
        refusal(write(content[:length]))


HUGE = [2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("huge", HUGE)
def test_no_size_is_believed(write: Callable[[bytes], Path], huge: int) -> None:
    length = struct.pack("<Q", huge)
    array = struct.pack("<IQ", STRING, huge)
    for content in [
        container(counts=(huge, 1)),
        container(counts=(0, huge)),
        container((length + b"key",)),
        container((pair("key", STRING, length + b"value"),)),
        container((pair("key", ARRAY, array + text("one")),)),
        container((pair("key", ARRAY, struct.pack("<IQ", STRING, 2) + text("one") + length),)),
        container((pair("key", ARRAY, struct.pack("<IQ", STRING, 300) + text("one") * 299 + length),)),
        container((pair("key", ARRAY, struct.pack("<IQ", FLOAT32, huge)),)),
        container(tensors=(length + b"name",)),
        container(tensors=(tensor("w", (huge,)),)),
        container(tensors=(tensor("w", (huge, huge, huge, huge)),)),
        container(tensors=(tensor("w", (2**16, 2**16, 2**16, 2**16)),)),
        container(tensors=(tensor("w", (32,), offset=huge),)),
    ]:
        start = time.process_time()
        refusal(write(content))
        assert time.process_time() - start < 0.5


@pytest.mark.parametrize("strings", [2**30, 2**21])
def test_an_endless_header_is_given_up(tmp_path: Path, strings: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(container((pair("key", ARRAY, struct.pack("<IQ", STRING, strings)),), counts=(0, 1000)))
    os.truncate(path, 2**34)  # what follows is a hole full of zeros, read as empty strings without end
    start = time.process_time()
    refusal(path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("pairs", "tensors", "what"),
    [
        ((pair("k", 13, b""),), (), "unknown type 13"),
        ((pair("k", ARRAY, struct.pack("<IQ", 13, 1)),), (), "unknown type 13"),
        ((pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),), (), "array of arrays"),
        ((ARCHITECTURE, ARCHITECTURE), (), "twice"),
        ((pair("", UINT32, bytes(4)),), (), "empty"),
        ((pair(b"\xff\xfe", UINT32, bytes(4)),), (), "UTF-8"),
        ((pair("general.alignment", UINT32, struct.pack("<I", 48)),), (), "alignment"),
        ((pair("general.alignment", UINT32, struct.pack("<I", 0)),), (), "alignment"),
        ((pair("general.alignment", UINT32, struct.pack("<I", 2**31)),), (), "alignment"),
        ((pair("general.alignment", STRING, text("\x1b[2J" * 1000)),), (), "alignment"),
        ((pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", -1)),), (), "epsilon"),
        ((pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", np.nan)),), (), "epsilon"),
        ((), (tensor("w", ()),), "0 dimensions"),
        ((), (tensor("w", (1, 1, 1, 1, 1)),), "5 dimensions"),
        ((), (tensor("w", (0, 4)),), "cannot have the shape"),
        ((), (tensor("w", (33, 4), TYPES["Q4_0"]),), "cannot have the shape"),
        ((), (tensor("w", (4, 4), 4),), "type 4"),
        ((), (tensor("w", (4, 4), 2**32 - 1),), "unknown"),
        ((), (tensor("w" * 64, (4,)),), "longer than 63 bytes"),
        ((), (tensor("", (4,)),), "empty"),
        ((), (tensor("\x1b]0;owned\x07", (2**20,)),), "the file at byte"),
        ((), (tensor("token_embd.weight", (4, 4), TYPES["F64"]),), "cannot compute"),
        ((), (tensor("blk.0.attn_norm.weight", (4,), TYPES["F16"]),), "cannot compute"),
        ((ARCHITECTURE,), (tensor("output.weight", (4, 4), TYPES["I32"]),), "cannot compute"),
    ],
)
def test_what_is_refused(
    write: Callable[[bytes], Path], pairs: tuple[bytes, ...], tensors: tuple[bytes, ...], what: str
) -> None:
    assert what in refusal(write(container(pairs, tensors))).message


def test_impossible_counts_are_named(write: Callable[[bytes], Path]) -> None:
    message = refusal(write(container(counts=(7, 2**40)))).message
    assert f"a header of 7 tensors and {2**40} metadata entries" in message


def test_the_last_byte_counts(write: Callable[[bytes], Path]) -> None:
    whole = container(tensors=(tensor("w", (1024,)),), data=4096)
    assert read_header(write(whole)).tensors[0].size == 4096
    assert "ends at byte" in refusal(write(whole[:-1])).message
