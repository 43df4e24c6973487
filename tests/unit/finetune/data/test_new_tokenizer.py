"""A tokenizer made for a model from scratch: deterministic, lossless, read by sentencepiece and transformers alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from koala_local.finetune.data.new_tokenizer import NewTokenizerError, train_tokenizer
from koala_local.finetune.data.tokens import DialogueTokenizer

from koala_local.dialogue import Dialogue, Turn

SIZE = 600


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    words = ["tree", "leaf", "koala", "river", "stone", "cloud", "apple", "house", "garden", "window"]
    lines = []
    for number in range(300):
        first, second = words[number % 10], words[(number * 7 + 3) % 10]
        question = {"role": "user", "content": f"What is a {first} beside {number} {second}s?"}
        answer = {"role": "assistant", "content": f"A {first} is often near a {second}, said number {number}."}
        lines.append(json.dumps({"messages": [question, answer]}))
    path.write_text("\n".join(lines))
    return path


def test_it_is_deterministic_and_loses_nothing(rows: Path, tmp_path: Path) -> None:
    lines = train_tokenizer([rows], SIZE, tmp_path / "one")
    train_tokenizer([rows], SIZE, tmp_path / "two")
    model = (tmp_path / "one" / "tokenizer.model").read_bytes()
    assert lines == 600
    assert model == (tmp_path / "two" / "tokenizer.model").read_bytes()
    reader = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert reader.get_piece_size() == SIZE
    assert (reader.unk_id(), reader.bos_id(), reader.eos_id()) == (0, 1, 2)
    for text in ("A koala  beside\n\n12 rivers", "Größe 🐨 \t x", ""):
        assert reader.decode(reader.encode(text)) == text
    assert [reader.id_to_piece(token) for token in reader.encode("427")][-3:] == ["4", "2", "7"]


def test_training_reads_it_as_a_tokenizer_of_its_own(rows: Path, tmp_path: Path) -> None:
    train_tokenizer([rows], SIZE, tmp_path / "made")
    tokenizer = DialogueTokenizer(tmp_path / "made", vocabulary_size=SIZE)
    found = tokenizer.encode(Dialogue((Turn("What is a tree?", "A tree is often near a leaf."),)))
    assert (found.ids[0], found.ids[-1]) == (1, 2)
    assert sum(found.trained) == len(found.ids) - found.replies[0]


def test_transformers_gives_the_same_ids(rows: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer([rows], SIZE, tmp_path / "made")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "made")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made" / "tokenizer.model"))
    text = "What is a koala beside 12 clouds?"
    assert theirs(text).input_ids == [1, *ours.encode(text)]


def test_plain_text_is_learned_from_however_long_its_lines(rows: Path, tmp_path: Path) -> None:
    text = " ".join(" ".join(turn["content"] for turn in json.loads(line)["messages"]) for line in rows.open())
    mine = tmp_path / "mine.jsonl"
    mine.write_text(
        json.dumps({"text": f"{text} {'quokka ' * 300}\n\nThe end."}) + "\nbroken\n" + json.dumps({"text": " "})
    )
    lines = train_tokenizer([mine], 480, tmp_path / "made")
    assert lines == -(-len(f"{text} {'quokka ' * 300}") // 4096) + 1 > 5
    tokenizer = DialogueTokenizer(tmp_path / "made", vocabulary_size=480)
    assert len(tokenizer.encode("quokka").ids) <= 4  # a word of the end of a long line, between BOS and EOS
    assert train_tokenizer([rows, mine], 480, tmp_path / "both") == lines + 600


def test_too_small_a_size_is_an_error_that_says_what_is_enough(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NewTokenizerError, match="300 pieces") as caught:
        train_tokenizer([rows], 300, tmp_path / "made")
    least = int(caught.value.hint.split(" at least")[0].split()[-1])
    train_tokenizer([rows], least, tmp_path / "made")


def test_files_without_text_are_an_error(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"text": " "}))
    with pytest.raises(NewTokenizerError, match="no dialogue and no text"):
        train_tokenizer([mine], SIZE, tmp_path / "made")


def test_too_little_text_is_an_error_that_says_so(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NewTokenizerError, match="5000 pieces") as caught:
        train_tokenizer([rows], 5000, tmp_path / "made")
    assert "smaller" in caught.value.hint
    assert not (tmp_path / "made").exists()
    most = int(caught.value.hint.split(" at most")[0].split()[-1])
    train_tokenizer([rows], most, tmp_path / "made")


def test_nothing_is_replaced(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NewTokenizerError, match="exists"):
        train_tokenizer([rows], SIZE, tmp_path)
