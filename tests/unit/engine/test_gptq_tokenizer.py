"""Text and special tokens of Hugging Face tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from koala_local.dialogue import KOALA
from koala_local.engine.gptq import GptqEngine, load_gptq
from koala_local.engine.plain_text import PlainText
from tests.engines import tiny_engine
from tests.gptq_maker import CONTEXT, ROWS, Made, make_gptq


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_gptq(tmp_path_factory.mktemp("made") / "koala-4bit")


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[GptqEngine]:
    engine = load_gptq(made.folder, CONTEXT)
    yield engine
    engine.close()


TEXTS = ["the hat, é 你 \U0001f428\n\tend", " two  spaces ", "", "a", "</s><s>", "<0x41>", "x\ud800y"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_pieces_spell_the_text(engine: GptqEngine, text: str) -> None:
    plain = text.encode("utf-8", "replace").decode()
    for continues, expected in ((False, f" {plain}" if plain else ""), (True, plain)):
        ids = engine.tokenize(text, continues=continues)
        assert b"".join(map(engine.piece, ids)).decode() == expected
        assert not {1, 2} & set(ids)


def test_ids_are_those_of_the_llama_engine(tmp_path: Path, engine: GptqEngine) -> None:
    """llama.cpp is the measure for what `continues` means; vocabularies differ, so the texts are compared by piece."""
    llama = tiny_engine(tmp_path)
    assert llama.vocabulary.adds_space == engine.vocabulary.adds_space
    for text in ("the", " the", "\n", "the hat"):
        for continues in (False, True):
            spelled = [b"".join(map(e.piece, e.tokenize(text, continues=continues))) for e in (llama, engine)]
            assert spelled[0] == spelled[1]
    llama.close()


def test_the_vocabulary_names_the_special_tokens(engine: GptqEngine) -> None:
    vocabulary = engine.vocabulary
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unknown, vocabulary.size) == (1, 2, 0, ROWS)
    assert vocabulary.add_bos and vocabulary.adds_space
    assert vocabulary.control["</s>"] == 2
    assert vocabulary.ends == {2}
    assert engine.piece(2) == b"" and engine.piece(ROWS - 1) == b""
    assert PlainText(engine, KOALA.markers).ids("</s> and <s>")


def test_a_lying_config_of_2023_does_not_decide_what_ends_a_reply(tmp_path: Path) -> None:
    engine = load_gptq(make_gptq(tmp_path / "old", of_2023=True).folder, CONTEXT)
    assert (engine.vocabulary.bos, engine.vocabulary.eos, engine.vocabulary.ends) == (1, 2, frozenset({2}))


def test_added_tokens_are_control_tokens(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "model")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 340, "[PAD]": 5000}))
    plain, engine = load_gptq(made.folder, 64), load_gptq(folder, 64)
    assert engine.vocabulary.control["<|im_end|>"] == 340
    assert engine.vocabulary.ends == {2, 340}
    assert "[PAD]" not in engine.vocabulary.control  # the model has no such row
    assert 340 not in engine.tokenize("<|im_end|>")
    assert engine.vocabulary.key != plain.vocabulary.key


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_a_tokenizer_json_serves_too(made: Made, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    tokenizer_json(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    engine = load_gptq(folder, 64)
    control = engine.vocabulary.control
    assert (engine.vocabulary.bos, engine.vocabulary.eos) == (control["<s>"], control["</s>"])
    assert engine.vocabulary.user_defined.keys() == {"<think>"}
    for text in TEXTS:
        plain = text.encode("utf-8", "replace").decode()
        ids = engine.tokenize(text, continues=True)
        assert b"".join(map(engine.piece, ids)).decode() == plain
        assert not set(control.values()) & set(ids)
    assert engine.vocabulary.adds_space == (kind == "byte fallback")


def tokenizer_json(kind: str) -> Tokenizer:
    if kind == "byte-level":
        vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        letters = "\u2581abcdefghijklmnopqrstuvwxyz"
        vocabulary = {text: i for i, text in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *letters])}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer
