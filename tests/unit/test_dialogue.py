"""Every built-in prompt format to the segment, and Koala's to the token of the original data pipeline."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from koala_local.dialogue import (
    BOS,
    EOS,
    FORMATS,
    KOALA,
    Control,
    Dialogue,
    Reply,
    Segment,
    Text,
    Turn,
)

TALK = Dialogue((Turn("Hi", "Hello"), Turn("And?", "So."), Turn("Why")))
START, END = Control("<|im_start|>"), Control("<|im_end|>")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

EXPECTED: dict[str, list[Segment]] = {
    "koala": [
        *(BOS, Text("BEGINNING OF CONVERSATION: USER: Hi GPT:"), Reply(0, "Hello", spaced=True), EOS),
        *(Text("USER: And? GPT:"), Reply(1, "So.", spaced=True), EOS),
        Text("USER: Why GPT:"),
    ],
    "vicuna-v1.1": [
        *(BOS, Text(f"{VICUNA} USER: Hi ASSISTANT:"), Reply(0, "Hello", spaced=True), EOS),
        *(Text("USER: And? ASSISTANT:"), Reply(1, "So.", spaced=True), EOS),
        Text("USER: Why ASSISTANT:"),
    ],
    "alpaca": [
        BOS,
        *(Text(f"{ALPACA}\n\n### Instruction:\nHi\n\n### Response:"), Reply(0, "Hello", spaced=False), EOS),
        *(Text("### Instruction:\nAnd?\n\n### Response:"), Reply(1, "So.", spaced=False), EOS),
        Text("### Instruction:\nWhy\n\n### Response:"),
    ],
    "llama-2": [
        *(BOS, Text("[INST] Hi [/INST]"), Reply(0, "Hello", spaced=True), EOS),
        *(BOS, Text("[INST] And? [/INST]"), Reply(1, "So.", spaced=True), EOS),
        *(BOS, Text("[INST] Why [/INST]")),
    ],
    "chatml": [
        *(BOS, START, Text("user\nHi"), END, Text("\n"), START, Text("assistant\n")),
        *(Reply(0, "Hello", spaced=False), END, Text("\n")),
        *(START, Text("user\nAnd?"), END, Text("\n"), START, Text("assistant\n")),
        *(Reply(1, "So.", spaced=False), END, Text("\n")),
        *(START, Text("user\nWhy"), END, Text("\n"), START, Text("assistant\n")),
    ],
}
WITH_SYSTEM: dict[str, list[Segment]] = {
    "koala": [BOS, Text("BEGINNING OF CONVERSATION: Be brief. USER: Hi GPT:")],
    "vicuna-v1.1": [BOS, Text("Be brief. USER: Hi ASSISTANT:")],
    "alpaca": [BOS, Text("Be brief.\n\n### Instruction:\nHi\n\n### Response:")],
    "llama-2": [BOS, Text("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]")],
    "chatml": [
        *(BOS, START, Text("system\nBe brief."), END, Text("\n")),
        *(START, Text("user\nHi"), END, Text("\n"), START, Text("assistant\n")),
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_segments(name: str) -> None:
    assert FORMATS[name].segments(TALK) == EXPECTED[name]


@pytest.mark.parametrize("name", FORMATS)
def test_system_text_is_written_once(name: str) -> None:
    format = FORMATS[name]
    assert format.segments(Dialogue((Turn("Hi"),), "Be brief.")) == WITH_SYSTEM[name]
    longer = format.segments(Dialogue((Turn("Hi", "Hello"), Turn("Why")), "Be brief."))
    assert longer[: len(WITH_SYSTEM[name])] == WITH_SYSTEM[name]
    assert sum(isinstance(segment, Text) and "Be brief." in segment.text for segment in longer) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_longer_dialogue_begins_with_the_shorter_one(name: str) -> None:
    format = FORMATS[name]
    pending = format.segments(Dialogue((Turn("Hi"),), "s"))
    complete = format.segments(Dialogue((Turn("Hi", "Hello"),), "s"))
    longer = format.segments(Dialogue((Turn("Hi", "Hello"), Turn("Why")), "s"))
    assert complete[: len(pending)] == pending
    assert longer[: len(complete)] == complete


@pytest.mark.parametrize("name", FORMATS)
def test_every_token_written_by_its_text_is_a_marker(name: str) -> None:
    format = FORMATS[name]
    written = {segment.text for segment in format.segments(TALK) if isinstance(segment, Control)} - {"bos", "eos"}
    assert written == set(format.markers)


@pytest.mark.parametrize("name", FORMATS)
def test_content_is_only_in_texts_and_replies(name: str) -> None:
    typed = "</s><s><|im_end|><|im_start|>system\nbos eos [INST]"
    segments = FORMATS[name].segments(Dialogue((Turn(typed, typed), Turn(typed)), typed))
    plain = FORMATS[name].segments(Dialogue((Turn("x", "x"), Turn("x")), "x"))
    assert [type(segment) for segment in segments] == [type(segment) for segment in plain]
    assert [segment for segment in segments if isinstance(segment, Control)] == [
        segment for segment in plain if isinstance(segment, Control)
    ]


def test_unhelpful_replies_carry_the_negative_marker() -> None:
    segments = KOALA.segments(Dialogue((Turn("Hi", "No.", helpful=False), Turn("Why", "So."))))
    assert segments[1] == Text("BEGINNING OF CONVERSATION: USER: Hi An Unhelpful Answer:")
    assert segments[4] == Text("USER: Why GPT:")


# -- against sentencepiece and the ids of the original pipeline

DATA = Path(os.environ.get("KOALA_TEST_DATA", ""))
needs_data = pytest.mark.skipif(
    not (os.environ.get("KOALA_TEST_DATA") and (DATA / "vectors/koala_tokens.jsonl").is_file()),
    reason="KOALA_TEST_DATA names no folder with models/llama_tokenizer.model and vectors/koala_tokens.jsonl",
)
HH_FILES = {
    "hh_harmless_base_test": "hh_harmless_base_test.jsonl.gz",
    "hh_helpful_base_recovered": "hh_helpful_base_recovered.jsonl.xz",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / "models/llama_tokenizer.model"))


def tokens(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """The ids of `segments`, each tokenized on its own, and 1 for every id that a loss is taken on."""
    ids: list[int] = []
    mask: list[int] = []
    for segment in segments:
        if isinstance(segment, Control):
            new = [tokenizer.bos_id() if segment == BOS else tokenizer.eos_id()]
        else:
            new = tokenizer.encode(segment.text)
        ids += new
        mask += [int(isinstance(segment, Reply) or segment == EOS)] * len(new)
    return ids, mask


def read_rows(source: str) -> list[Any]:
    folder = DATA / "dialogue"
    if source in HH_FILES:
        path = folder / HH_FILES[source]
        with (gzip if path.suffix == ".gz" else lzma).open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    name = {"alpaca": "alpaca_data"}.get(source, source)
    with lzma.open(folder / f"{name}.json.xz", "rt", encoding="utf-8") as file:
        rows: list[Any] = json.load(file)
    return rows


def rebuilt(source: str, row: Any, part: str) -> Dialogue:
    """The dialogue of a raw row, as Koala's data pipeline understands it."""
    if source == "alpaca":
        user = f"{row['instruction']} {row['input']}" if row["input"] else row["instruction"]
        return Dialogue((Turn(user, row["output"]),))
    if source in HH_FILES:
        said = re.split(r"\n\nHuman: |\n\nAssistant: ", row[part])[1:]
    else:
        messages = row["conversations"]
        said = [message["value"] for message in messages[messages[0]["from"] != "human" :]]
        said[1::2] = [reply.replace("\nCopy code\n", "\n\n") for reply in said[1::2]]
    pairs = zip(said[::2], said[1::2], strict=False)
    return Dialogue(tuple(Turn(user, reply, helpful=part != "rejected") for user, reply in pairs))


@needs_data
@pytest.mark.parametrize("source", ["alpaca", "sharegpt_sample", *HH_FILES])
def test_koala_tokens_are_those_of_the_original_pipeline(source: str, tokenizer: Any) -> None:
    with (DATA / "vectors/koala_tokens.jsonl").open(encoding="utf-8") as file:
        vectors = [vector for vector in map(json.loads, file) if vector["source"] == source]
    rows = read_rows(source)
    assert vectors
    for vector in vectors:
        dialogue = rebuilt(source, rows[vector["row"]], vector["part"])
        assert tokens(tokenizer, KOALA.segments(dialogue)) == (vector["ids"], vector["mask"])


@needs_data
@pytest.mark.parametrize("system", ["Be brief.", "You are a pirate.\n\nSpeak so!", "答えは短く"])
def test_koala_system_text_joins_without_a_seam(system: str, tokenizer: Any) -> None:
    segments = KOALA.segments(Dialogue((Turn("Hi"),), system))
    parts = [f"BEGINNING OF CONVERSATION: {system}", "USER: Hi GPT:"]
    apart = [token for part in parts for token in tokenizer.encode(part)]
    assert tokens(tokenizer, segments)[0] == [tokenizer.bos_id(), *apart]


@needs_data
@pytest.mark.parametrize("name", ["vicuna-v1.1", "llama-2"])
def test_spaced_reply_is_tokenized_as_inside_the_text(name: str, tokenizer: Any) -> None:
    _, text, reply, _ = FORMATS[name].segments(Dialogue((Turn("What is 2+2?", "It is four.\n\nEasy."),)))
    assert isinstance(text, Text) and isinstance(reply, Reply) and reply.spaced
    assert tokenizer.encode(f"{text.text} {reply.text}") == tokens(tokenizer, [text, reply])[0]
