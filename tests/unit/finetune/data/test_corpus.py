"""A corpus written and read back, and what is made of a damaged one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from koala_local.finetune.data.corpus import Corpus, CorpusError, Counts, open_corpus
from koala_local.finetune.data.corpus_writer import write_corpus
from koala_local.finetune.data.examples import Example
from koala_local.finetune.data.tokens import DialogueTokenizer
from koala_local.finetune.data.workers import workers

from koala_local.dialogue import Dialogue, Turn

from .tokenizer_maker import train_sentencepiece

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "koala", "of", "the", "trees", "was", "what", "it"]


def examples(count: int = 700) -> Iterator[tuple[Example, bool]]:
    for number in range(count):
        turns = tuple(Turn(" ".join(WORDS[: 1 + turn]), WORDS[number % 15]) for turn in range(1 + number % 3))
        source = ("sharegpt", "hh", "notes")[number % 3]
        dialogue = Dialogue(turns, "be kind" if number % 7 == 0 else "")
        content = " ".join(WORDS[: 1 + number % 9]) if source == "notes" else dialogue
        yield Example(content, source, f"row {number}"), number % 50 == 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> DialogueTokenizer:
    return DialogueTokenizer(train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


def write(tokenizer: DialogueTokenizer, folder: Path, **options: Any) -> Path:
    write_corpus(examples(), tokenizer, folder, inputs={"a.json": "00"}, recipe={"name": "koala-all"}, **options)
    return folder


@pytest.fixture(scope="module")
def made(tokenizer: DialogueTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tokenizer, tmp_path_factory.mktemp("made") / "corpus")


def test_what_is_read_is_what_was_written(made: Path, tokenizer: DialogueTokenizer) -> None:
    corpus = open_corpus(made, tokenizer.key)
    assert len(corpus) == 700
    tokens, trained = dict.fromkeys(corpus.source_names, 0), dict.fromkeys(corpus.source_names, 0)
    for index, (example, held_out) in enumerate(examples()):
        expected = tokenizer.encode(example.content)
        ids, mask = corpus.document(index)
        assert (ids.tolist(), mask.tolist()) == (expected.ids, list(expected.trained))
        assert corpus.turns_of(index).tolist() == [
            list(p) for p in zip(expected.prompts, expected.replies, strict=True)
        ]
        assert corpus.headers[index] == expected.prompts[0]
        assert corpus.source_names[corpus.sources[index]] == example.source
        assert corpus.held_out[index] == held_out
        assert (corpus.lengths[index], corpus.trained_counts[index]) == (len(expected.ids), sum(expected.trained))
        tokens[example.source] += 0 if held_out else len(expected.ids)
        trained[example.source] += 0 if held_out else sum(expected.trained)
    manifest = corpus.manifest
    assert {name: counts.tokens for name, counts in manifest.sources.items()} == tokens
    assert {name: counts.trained_tokens for name, counts in manifest.sources.items()} == trained
    assert (manifest.tokens, manifest.trained_tokens) == (sum(tokens.values()), sum(trained.values()))
    assert sum(counts.held_out for counts in manifest.sources.values()) == 14
    assert (manifest.inputs, manifest.recipe) == ({"a.json": "00"}, {"name": "koala-all"})
    assert corpus.tokens.dtype == np.uint16 and not corpus.tokens.flags.writeable


def test_the_bytes_do_not_depend_on_the_processes(made: Path, tokenizer: DialogueTokenizer, tmp_path: Path) -> None:
    with workers(2) as work:
        write(tokenizer, tmp_path, work=work)
    assert contents(tmp_path) == contents(made)
    assert open_corpus(tmp_path).key == open_corpus(made).key


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_progress_is_told(tokenizer: DialogueTokenizer, tmp_path: Path) -> None:
    told: list[int] = []
    write(tokenizer, tmp_path, progress=told.append)
    assert told == sorted(told) and told[0] < told[-1] == 700 == len(open_corpus(tmp_path))


def test_an_empty_corpus_is_a_corpus(tokenizer: DialogueTokenizer, tmp_path: Path) -> None:
    write_corpus([], tokenizer, tmp_path, inputs={}, recipe={})
    corpus = open_corpus(tmp_path)
    assert len(corpus) == 0 and corpus.lengths.tolist() == corpus.trained_counts.tolist() == []


@pytest.mark.parametrize("turns", [(), (Turn("a", "b"), Turn("c"))], ids=["no turn", "no reply"])
def test_an_example_without_a_reply_is_refused(
    tokenizer: DialogueTokenizer, tmp_path: Path, turns: tuple[Turn, ...]
) -> None:
    bad = Example(Dialogue(turns, "only a system text"), "own", "mine.jsonl:3")
    with pytest.raises(CorpusError, match=r"own, mine\.jsonl:3"):
        write_corpus([*examples(3), (bad, False)], tokenizer, tmp_path / "new", inputs={}, recipe={})
    assert list((tmp_path / "new").iterdir()) == []


def test_a_corpus_is_not_overwritten(made: Path, tokenizer: DialogueTokenizer) -> None:
    before = contents(made)
    with pytest.raises(CorpusError, match="has a corpus already"):
        write(tokenizer, made)
    assert contents(made) == before


def test_a_full_disk_leaves_no_corpus(
    tokenizer: DialogueTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError, match="No space left on device"):
        write(tokenizer, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from tests.unit.finetune.data.test_corpus import write
from koala_local.finetune.data.tokens import DialogueTokenizer
tokenizer = DialogueTokenizer(Path(sys.argv[1]))
print("ready", flush=True)
write(tokenizer, Path(sys.argv[2]))
"""


@pytest.mark.parametrize("delay", [0.03, 0.12])
def test_a_killed_writer_leaves_a_whole_corpus_or_none(
    made: Path, tokenizer: DialogueTokenizer, tmp_path: Path, delay: float
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(tokenizer.path), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[4]) as writer:
        assert writer.stdout and writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
    try:
        found = open_corpus(out)
    except CorpusError as error:
        assert "there is no corpus" in error.message
        write(tokenizer, out)  # what the killed one left is in nobody's way
        found = open_corpus(out)
    assert found.key == open_corpus(made).key


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def test_a_corpus_of_another_tokenizer_is_refused(made: Path) -> None:
    with pytest.raises(CorpusError, match="another tokenizer") as caught:
        open_corpus(made, "0" * 64)
    assert "koala data build" in caught.value.hint


def test_a_folder_without_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is no corpus"):
        open_corpus(tmp_path / "nowhere")


FILES = ["tokens", "trained", "documents", "turns", "places", "sources", "held_out"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "longer", "changed", "gone"])
def test_a_damaged_file_is_found(copy: Path, name: str, damage: str) -> None:
    path = copy / f"{name}.bin"
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"\0")
        case "changed":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "gone":
            path.unlink()
    with pytest.raises(CorpusError, match=f"{name}.bin"):
        open_corpus(copy)


def lie(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file so that the manifest agrees."""
    path = folder / f"{name}.bin"
    kinds = {"tokens": "<u2", "trained": "u1", "sources": "<u2", "held_out": "u1", "places": "<i4"}
    numbers = np.frombuffer(path.read_bytes(), kinds.get(name, "<i8")).copy()
    data = change(numbers).tobytes()
    path.write_bytes(data)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(tree))


def put(place: int, value: int) -> Callable[[Any], Any]:
    def change(numbers: Any) -> Any:
        numbers[place] = value
        return numbers

    return change


LIES = {
    "an id beyond the vocabulary": ("tokens", put(5, 60_000)),
    "a mask of 2": ("trained", put(5, 2)),
    "fewer masks": ("trained", lambda numbers: numbers[:-1]),
    "an offset behind the end": ("documents", put(3, 1 << 40)),
    "a negative offset": ("documents", put(1, -5)),
    "a last offset before the end": ("documents", put(-1, 10)),
    "no offsets": ("documents", lambda numbers: numbers[:0]),
    "more turns than there are": ("turns", put(-1, 1 << 40)),
    "a document without a turn": ("turns", lambda numbers: np.concatenate([numbers[:1], numbers[:-1]])),
    "a turn behind its document": ("places", put(1, 1 << 30)),
    "a turn before its document": ("places", put(0, -1)),
    "a reply before its prompt": ("places", put(1, 0)),
    "a reply as its first token": ("places", lambda numbers: put(1, 0)(put(0, 0)(numbers))),
    "a source that there is not": ("sources", put(0, 3)),
    "fewer documents": ("sources", lambda numbers: numbers[:-1]),
    "held out twice": ("held_out", put(0, 2)),
    "held out, fewer": ("held_out", lambda numbers: numbers[:-1]),
}


@pytest.mark.parametrize("what", LIES)
def test_numbers_that_lead_nowhere_are_found(copy: Path, what: str) -> None:
    lie(copy, *LIES[what])
    with pytest.raises(CorpusError, match="numbers that cannot be"):
        open_corpus(copy)


MANIFESTS: dict[str, dict[str, Any]] = {
    "version": {"version": 2},
    "vocabulary": {"vocabulary_size": 0},
    "huge vocabulary": {"vocabulary_size": 10**30},
    "no files": {"files": {}},
    "files of another kind": {"files": [1]},
    "negative length": {"files": {name: {"bytes": -1, "sha256": ""} for name in FILES}},
    "sources": {"sources": {"a": {"documents": "1"}}},
    "inputs": {"inputs": {"a": 1}},
    "recipe": {"recipe": 3},
    "key": {"tokenizer_key": None},
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_lying_manifest_is_found(copy: Path, what: str) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | MANIFESTS[what]))
    with pytest.raises(CorpusError):
        open_corpus(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": NaN}', "[" * 100_000])
def test_a_manifest_that_is_no_object_is_found(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CorpusError):
        open_corpus(copy)


def test_counts_are_of_what_is_trained_on(made: Path) -> None:
    corpus: Corpus = open_corpus(made)
    for index, (_, counts) in enumerate(corpus.manifest.sources.items()):
        of_source = corpus.sources == index
        kept = of_source & ~corpus.held_out
        assert counts == Counts(
            int(kept.sum()),
            int((of_source & corpus.held_out).sum()),
            int(corpus.lengths[kept].sum()),
            int(corpus.trained_counts[kept].sum()),
        )
