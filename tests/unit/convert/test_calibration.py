"""Samples of token ids from texts and dialogues: exact windows, stated sources, refused files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from koala_local.convert import calibration
from koala_local.convert.calibration import (
    CalibrationError,
    Texts,
    Tokenizer,
    builtin_calibration,
    builtin_held_out,
    make_sample,
    read_texts,
)

LETTERS = Tokenizer(lambda text: [ord(c) for c in text])
MARKED = Tokenizer(LETTERS.encode, bos=1, eos=2)


def written(ids: tuple[int, ...]) -> str:
    return "".join({1: "<s>", 2: "</s>"}.get(i) or chr(i) for i in ids)


def whole(texts: Texts) -> str:
    """Everything the texts have, as one sequence."""
    count = make_sample(texts, MARKED, length=2).available
    return written(make_sample(texts, MARKED, length=count + 1).sequences[0])[3:]


def test_the_builtin_texts_are_sizeable_and_share_no_sentence() -> None:
    calibration_text, held_out = builtin_calibration().documents[0], builtin_held_out().documents[0]
    assert isinstance(calibration_text, str) and isinstance(held_out, str)
    assert 20_000 < len(calibration_text) < 32_000 and len(held_out) > 8_000
    first, second = (
        {" ".join(t[i : i + 6]) for i in range(len(t) - 5)} for t in (calibration_text.split(), held_out.split())
    )
    shared = first & second
    assert len(shared) < 3, shared


def test_sequences_cover_the_text_without_repeating_it() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    sample = make_sample(Texts((text,), "a text"), MARKED, length=101)
    assert len(sample.sequences) == 10 and {len(ids) for ids in sample.sequences} == {101}
    assert all(ids[0] == 1 for ids in sample.sequences)
    assert "".join(written(ids[1:]) for ids in sample.sequences) == text
    assert str(sample) == "10 x 101 tokens from a text, which has 1,000 tokens"


def test_a_long_text_is_sampled_from_beginning_to_end() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(5000))
    sample = make_sample(Texts((text,), "a text"), LETTERS, length=10, most=4)
    starts = [text.index(written(ids)) for ids in sample.sequences]
    assert starts == [0, 1663, 3326, 4990]


def test_repeats_are_made_when_asked_for_and_stated() -> None:
    sample = make_sample(Texts(("abcdefghij",), "a text"), LETTERS, length=4, sequences=6)
    assert [written(ids) for ids in sample.sequences] == ["abcd", "efgh", "ijab", "cdef", "ghij", "abcd"]
    assert sample.repeats == 2.4
    assert str(sample) == "6 x 4 tokens from a text, which has 10 tokens, each used 2.4 times"
    short = make_sample(Texts(("abc",), "a text"), LETTERS, length=8, sequences=1)
    assert written(short.sequences[0]) == "abcabcab"


def test_a_short_text_makes_one_short_sequence() -> None:
    sample = make_sample(Texts(("abc",), "a text"), MARKED, length=2048)
    assert sample.sequences == ((1, 97, 98, 99),) and sample.tokens == 4
    assert [batch.tolist() for batch in sample.batches()] == [[[1, 97, 98, 99]]]


@pytest.mark.parametrize("text", ["", "a"])
def test_hardly_any_text_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match=f"{len(text)} tokens"):
        make_sample(Texts((text,), "a text"), MARKED)


MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
SHARED = {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two"}]}
HEADER = "BEGINNING OF CONVERSATION:"


def test_dialogues_are_written_as_koala_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, [MESSAGES, SHARED, {"text": "plain"}])) + "\n\n")
    texts = read_texts(file)
    assert texts.source == "talks.jsonl"
    assert whole(texts) == f"<s>{HEADER} USER: Hi GPT:Hello</s><s>{HEADER} USER: One? GPT:Two</s>plain"


def test_a_json_list_and_a_single_object_are_read(tmp_path: Path) -> None:
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([MESSAGES, SHARED], indent=1))
    assert len(read_texts(file).documents) == 2
    file.write_text(json.dumps(MESSAGES))
    assert len(read_texts(file).documents) == 1


def test_roles_out_of_order_lose_nothing(tmp_path: Path) -> None:
    roles = [("system", "S"), ("assistant", "A0"), ("user", "U1"), ("user", "U2"), ("assistant", "A1"), ("tool", "T")]
    roles += [("assistant", "A2"), ("user", "U3")]
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}))
    assert whole(read_texts(file)) == f"<s>{HEADER} S\nA0\nT USER: U1\nU2 GPT:A1\nA2</s>USER: U3 GPT:"


def test_plain_text_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffGrüße </s> 🐨".encode())
    assert whole(read_texts(file)) == "Grüße </s> 🐨"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"{not json}"),
        ("a.jsonl", b"3"),
        ("a.jsonl", b'{"messages": 3}'),
        ("a.jsonl", b'{"messages": [3]}'),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": ["x"]}]}'),
        ("a.jsonl", b'{"other": []}'),
        ("a.jsonl", b"[" * 100_000),
        ("a.json", b"[1]"),
        ("a.json", b"[{"),
        ("a.txt", b"caf\xe9"),
    ],
)
def test_what_is_no_dialogue_or_no_text_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CalibrationError):
        read_texts(file)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(CalibrationError, match="not a file"):
            read_texts(path)


def test_only_the_beginning_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_READ", 101)
    text, lines, array = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.json"
    text.write_text("a" + "ü" * 200)
    assert read_texts(text).documents == ("a" + "ü" * 50,)
    text.write_text("ü" * 200)  # the bound lies inside a character
    assert read_texts(text).documents == ("ü" * 50,) and "first" in read_texts(text).source
    lines.write_text('{"text": "' + "x" * 20 + '"}\n' + '{"text": "' + "y" * 200 + '"}\n')
    assert read_texts(lines).documents == ("x" * 20,)
    array.write_text(json.dumps([{"text": "x" * 200}]))
    with pytest.raises(CalibrationError, match="one JSON list"):
        read_texts(array)


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(alphabet="ab\nü", min_size=2, max_size=200),
    length=st.integers(2, 50),
    sequences=st.none() | st.integers(1, 9),
)
def test_any_text_gives_what_was_asked_for(text: str, length: int, sequences: int | None) -> None:
    sample = make_sample(Texts((text,), "it"), MARKED, length=length, sequences=sequences)
    assert sample.available == len(text)
    assert len(sample.sequences) == (sequences or len(sample.sequences))
    for ids in sample.sequences:
        assert len(ids) == (length if sequences else min(length, len(text) + 1))
        assert written(ids[1:]) in text * (2 + length // len(text))


def test_long_texts_are_tokenized_in_parts_that_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_PIECE", 10)
    asked: list[str] = []

    def encode(text: str) -> list[Any]:
        asked.append(text)
        return list(LETTERS.encode(text))

    text = "one\ntwo three\n" + "x" * 25 + "\nfour"
    make_sample(Texts((text,), "it"), Tokenizer(encode), length=4)
    assert "".join(asked) == text and max(map(len, asked)) <= 10 and asked[0] == "one\n"
