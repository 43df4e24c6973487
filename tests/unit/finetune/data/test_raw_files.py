"""Raw files of every kind are read to the last row; a broken row costs itself, a broken file says so."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from koala_local.finetune.data import raw_files
from koala_local.finetune.data.raw_files import RawFileError, Skipped, rows, unpacked_name

PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
ROWS: list[Any] = [
    {"text": 'braces } ] , and "quotes" \\', "n": [1, [2, {"x": None}]]},
    {"text": "猫 🐨\n\u2028", "deep": {"a": {"b": []}}},
    {},
    "plain",
    7,
]


def values(path: Path) -> list[Any]:
    return [row if isinstance(row, Skipped) else row[1] for row in rows(path)]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("indent", [None, 1, 4])
def test_an_array_is_read_with_the_numbers_of_its_elements(tmp_path: Path, suffix: str, indent: int | None) -> None:
    data = json.dumps(ROWS, indent=indent, ensure_ascii=indent is None).encode()
    path = written(tmp_path / f"a.json{suffix}", PACKERS[suffix](data))
    assert list(rows(path)) == [(f"a.json[{number}]", row) for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_read_with_their_numbers(tmp_path: Path, suffix: str, end: str) -> None:
    lines = [end, *(json.dumps(row, ensure_ascii=False) + end for row in ROWS[:2]), "  " + end, json.dumps(ROWS[2])]
    path = written(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix]("".join(lines).encode()))
    assert list(rows(path)) == [("a.jsonl:2", ROWS[0]), ("a.jsonl:3", ROWS[1]), ("a.jsonl:5", ROWS[2])]


@pytest.mark.parametrize("suffix", PACKERS)
def test_parquet_is_read(tmp_path: Path, suffix: str) -> None:
    table = [{"conversations": [{"from": "human", "value": f"{n}"}], "n": n or None} for n in range(150)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "plain")
    path = written(tmp_path / f"a.parquet{suffix}", PACKERS[suffix]((tmp_path / "plain").read_bytes()))
    assert list(rows(path)) == [(f"a.parquet[{number}]", row) for number, row in enumerate(table)]


def test_the_content_tells_the_kind_not_the_name(tmp_path: Path) -> None:
    assert values(written(tmp_path / "a.parquet", gzip.compress(b'[{"a": 1}]'))) == [{"a": 1}]
    assert values(written(tmp_path / "a.json", b'{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert values(written(tmp_path / "b.json", b'\xef\xbb\xbf\n [{"a": 1}] \n')) == [{"a": 1}]


def test_names_begin_with_the_label_or_the_unpacked_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(b"{}"))
    assert list(rows(path)) == [("a.jsonl:1", {})]
    assert list(rows(path, "base/a.jsonl")) == [("base/a.jsonl:1", {})]
    assert [unpacked_name(name) for name in ("a.json.xz", "b.gz", "c.jsonl")] == ["a.json", "b", "c.jsonl"]


def test_packed_streams_behind_each_other_are_one(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    assert values(path) == [{"a": 1}, {"a": 2}]


BROKEN = [
    (b'{"a": 1', "not valid JSON"),
    (b"{'a': 1}", "not valid JSON"),
    (b'{"a": "\xff"}', "not valid UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
    (b"[" * 50_000 + b"]" * 50_000, "not valid JSON"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
    (b'{"n": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    (b'{"a": "tab\there"}', "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_costs_that_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = written(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert list(rows(path)) == [("a.jsonl:1", {"a": 1}), Skipped("a.jsonl:2", reason), ("a.jsonl:3", {"a": 2})]


@pytest.mark.parametrize(
    ("element", "reason"), [*BROKEN[1:], (b'{"a": 1 "b": {"c": 2]}', "not valid JSON"), (b" ", "")]
)
def test_a_broken_element_costs_that_element(tmp_path: Path, element: bytes, reason: str) -> None:
    path = written(tmp_path / "a.json", b'[{"a": 1},' + element + b',{"a": 2}]')
    assert list(rows(path)) == [
        ("a.json[0]", {"a": 1}),
        Skipped("a.json[1]", reason or "not valid JSON"),
        ("a.json[2]", {"a": 2}),
    ]


def test_odd_json_is_no_crash(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", rb'{"a": NaN, "b": -Infinity, "c": "\ud800", "d": 1, "d": 2, "e": "\u0000"}')
    (row,) = values(path)
    assert row["a"] != row["a"] and row["c"] == "\ud800" and row["d"] == 2 and row["e"] == "\0"


@pytest.mark.parametrize("empty", [b"", b"\n\n", b"[]", b" [ ]\n", gzip.compress(b"")])
def test_what_is_empty_has_no_rows(tmp_path: Path, empty: bytes) -> None:
    assert values(written(tmp_path / "a.json", empty)) == []


def text(n: int) -> bytes:
    return json.dumps([{"n": number, "words": "koala " * number} for number in range(n)]).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1, 2", "ends inside element 1"),
        (b"[", "ends inside element 0"),
        (b'[{"a": "no end}, {"b": 1}]', "ends inside element"),
        (b"[1] [2]", "goes on behind the end"),
        (gzip.compress(text(500))[:-900], "cannot be unpacked"),
        (lzma.compress(text(500))[:-200], "cannot be unpacked"),
        (b"\x1f\x8b" + bytes(50), "cannot be unpacked"),
        (b"\xfd7zXZ\0" + bytes(50), "cannot be unpacked"),
        (b"PAR1" + bytes(50), "cannot be read as Parquet"),
        (gzip.compress(b"PAR1" + bytes(50)), "cannot be read as Parquet"),
        (b"PK\x03\x04" + bytes(50), "is zip"),
        (b"BZh91AY", "is bzip2"),
        ("\ufeff[1]".encode("utf-16-le"), "is UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, data: bytes, message: str) -> None:
    path = written(tmp_path / "bad.json", data)
    with pytest.raises(RawFileError, match=message) as caught:
        values(path)
    assert "bad.json" in caught.value.message and caught.value.hint


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RawFileError, match="does not exist"):
        values(tmp_path / "none.jsonl")
    with pytest.raises(RawFileError, match="is no file"):
        values(tmp_path)


def test_a_damaged_parquet_file_never_crashes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["koala"] * 50, "n": list(range(50))}), tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    for place in range(4, len(good), 7):
        path = written(tmp_path / "b.parquet", good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            values(path)
        except RawFileError as error:
            assert "b.parquet" in error.message


def test_text_in_parquet_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"a": "good"}, Skipped("a.parquet[1]", "not valid UTF-8"), {"a": "fine"}]


def test_a_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_files, "LONGEST", 100)
    exact = b'"' + b"x" * 97 + b'"\n'
    path = written(tmp_path / "a.jsonl", exact + b'"' + b"x" * 98 + b'"\n' + b'"' + b"x" * 950 + b'"\n' + b"1\n")
    assert values(path) == ["x" * 97, Skipped("a.jsonl:2", "too long"), Skipped("a.jsonl:3", "too long"), 1]


def test_an_element_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_files, "LONGEST", 100)
    monkeypatch.setattr(raw_files, "_CHUNK", 10)
    path = written(tmp_path / "a.json", b'[1, "' + b"x" * 300 + b'", 2]')
    with pytest.raises(RawFileError, match="element 1 of the array is longer"):
        values(path)


@pytest.mark.parametrize("start", ["", "[", "\n"])
@pytest.mark.parametrize("filling", ["x", "\n", "["])
def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, filling: str) -> None:
    monkeypatch.setattr(raw_files, "_SMALL", 8 << 20)
    path = tmp_path / "bomb.json.xz"
    with lzma.open(path, "wb", preset=0) as file:
        file.write(start.encode())
        for _ in range(12):
            file.write(filling.encode() * (1 << 20))
    assert path.stat().st_size < 100_000
    started = time.process_time()
    with pytest.raises(RawFileError, match=r"unpacks to more than|is longer than|brackets deep"):
        for _ in rows(path):
            pass
    assert time.process_time() - started < 20


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(30_000):
            file.write(json.dumps({"n": number, "text": "koala " * 300}) + ",\n")
        file.write("{}]")
    code = (
        "import resource, sys; from pathlib import Path; from koala_local.finetune.data.raw_files import rows;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "count = sum(1 for _ in rows(Path(sys.argv[1])));"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert path.stat().st_size > 50e6
    assert count == 30_001 and grown < 25_000 * (1024 if sys.platform == "darwin" else 1)  # KiB


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(json_values, max_size=8), st.sampled_from([None, 2]), st.booleans(), st.integers(1, 40))
def test_any_array_is_what_json_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[Any], indent: int | None, plain: bool, chunk: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(raw_files, "_CHUNK", chunk)
        data = json.dumps(found, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass")
        path = written(tmp_path / "any.json", data)
        assert values(path) == [
            Skipped(f"any.json[{n}]", "not valid UTF-8") if not _encodes(each, plain) else each
            for n, each in enumerate(found)
        ]


def _encodes(value: Any, plain: bool) -> bool:
    try:
        json.dumps(value, ensure_ascii=plain).encode()
    except UnicodeEncodeError:
        return False
    return True
