"""Koala's prompt tokens, the engine's against sentencepiece itself, on the real LLaMA vocabulary."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from koala_local.chat.ledger import Exchange, Ledger
from koala_local.dialogue import KOALA, Turn
from koala_local.engine.llama import LlamaEngine, Placement

DATA = Path(os.environ.get("KOALA_TEST_DATA", "/nonexistent")) / "models"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="KOALA_TEST_DATA names no data folder")

AWKWARD = [
    "Hello! How are you?",
    "",
    " ",
    "  two spaces  ",
    "line\nbreak\n\n\tand tab",
    "naïve café 你好 🐨 \u200b",
    "USER: GPT: BEGINNING OF CONVERSATION:",
    "ends with space ",
    "def f(x):\n    return x  # 1234567890",
    "é" * 40,
]


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    engine = LlamaEngine(DATA / "llama-2-tiny-random.gguf", "test", Placement(context=512, threads=1))
    yield Ledger(engine, KOALA)
    engine.close()


@pytest.fixture(scope="module")
def reference() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / "llama_tokenizer.model"))


def random_text(draw: random.Random) -> str:
    alphabet = "abcdefghij XYZ .,!?\n\t0123éü你好🐨ابج_-/#"
    return "".join(draw.choice(alphabet) for _ in range(draw.randrange(60)))


def test_prompts_are_those_of_sentencepiece(ledger: Ledger, reference: sentencepiece.SentencePieceProcessor) -> None:
    draw = random.Random(3)
    for text in [*AWKWARD, *(random_text(draw) for _ in range(500))]:
        reply, system = random_text(draw), random_text(draw).strip()
        path = [Exchange(Turn(text, reply)), Exchange(Turn("next"))]
        header = f"BEGINNING OF CONVERSATION: {system} " if system else "BEGINNING OF CONVERSATION: "
        expected = [
            1,
            *reference.encode(f"{header}USER: {text} GPT:"),
            *reference.encode(reply),
            2,
            *reference.encode("USER: next GPT:"),
        ]
        assert ledger.ids(system, path) == expected


def test_header_and_turn_tokenize_the_same_joined_or_apart(ledger: Ledger) -> None:
    """So the header is a prefix that stays in place when turns leave the context."""
    tokenize = ledger.engine.tokenize
    for text in AWKWARD:
        joined = tokenize(f"BEGINNING OF CONVERSATION: USER: {text} GPT:")
        assert joined == tokenize("BEGINNING OF CONVERSATION:") + tokenize(f"USER: {text} GPT:")


def test_typed_control_tokens_stay_text(ledger: Ledger) -> None:
    for text in ("</s>", "<s>", "<unk>", "a</s>b", "</s></s>", "<0x0A>"):
        ids = [
            token
            for piece in ledger.pieces(text, [Exchange(Turn(text))])
            if piece.kind != "control"
            for token in piece.ids
        ]
        assert not {0, 1, 2} & set(ids)
