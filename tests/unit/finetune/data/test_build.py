"""A corpus from raw files: what stays, the same bytes however it is made, and nothing torn however it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from koala_local.finetune.data.build import BuildError, build, choose_recipe
from koala_local.finetune.data.contamination import find_sets, read_set
from koala_local.finetune.data.corpus import open_corpus
from koala_local.finetune.data.examples import Example, read_examples
from koala_local.finetune.data.look import look
from koala_local.finetune.data.mix import choose_held_out
from koala_local.finetune.data.packing import make_plan
from koala_local.finetune.data.sources import SOURCES
from koala_local.finetune.data.tokens import DialogueTokenizer

from koala_local.dialogue import Dialogue
from koala_local.disk import lock
from koala_local.errors import KoalaError
from tests.unit.finetune.data.raw_maker import GERMAN, STORY, TESTED, conversation, make_raw, sentence

PLAIN = 120


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("koala-data") / "raw", PLAIN)


@pytest.fixture(scope="module")
def built(raw: Path) -> Path:
    out = raw.parent / "built"
    make(raw, out)
    return out


def make(raw: Path, out: Path, **options: Any) -> dict[str, Any]:
    recipe = choose_recipe(str(raw / "mine.toml"))
    return build(recipe, out, DialogueTokenizer(raw / "tokenizer.model"), raw=raw, **{"processes": 1, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def first_query(example: Example) -> str:
    assert isinstance(example.content, Dialogue)
    return example.content.turns[0].user


def test_what_stays_and_why_the_rest_does_not(built: Path) -> None:
    sources = json.loads((built / "report.json").read_text())["sources"]
    sharegpt = sources["sharegpt"]
    assert (sharegpt["rows"], sharegpt["kept"]) == (PLAIN + 7, PLAIN + 1)
    assert sharegpt["removed"] == {"keyword": 1, "language": 1, "contaminated": 1, "exact": 1, "near": 1}
    assert sharegpt["skipped"] == {"no user message with a reply": 1}
    assert sharegpt["contaminated"][0]["query"] == TESTED
    assert sharegpt["contaminated"][0]["test_row"] == "koala_test_set.jsonl:1"
    assert sources["hc3"]["kept"] == 3 * PLAIN  # equal queries of one row are no duplicates
    assert (sources["alpaca"]["kept"], sources["alpaca"]["removed"]["exact"]) == (PLAIN, 1)
    assert sources["hh"]["kept"] == 2 * sources["hh"]["rows"] == 2 * sources["hh"]["unhelpful"]
    assert (sources["notes"]["kept"], sources["notes"]["skipped"]) == (1, {"not valid JSON": 1})


def test_the_mix_and_the_tokens_are_the_same_dialogues(built: Path, raw: Path) -> None:
    tokenizer = DialogueTokenizer(raw / "tokenizer.model")
    corpus = open_corpus(built, tokenizer.key)
    examples = list(read_examples(built / "dialogues.jsonl"))
    assert len(examples) == len(corpus)
    for index, (example, held_out) in enumerate(examples):
        assert corpus.document(index)[0].tolist() == tokenizer.encode(example.content).ids
        assert corpus.source_names[corpus.sources[index]] == example.source
        assert corpus.held_out[index] == held_out
    assert sum(first_query(example) == STORY for example, _ in examples) == 1
    report = json.loads((built / "report.json").read_text())
    assert report["total"]["tokens"] == len(corpus.tokens)
    assert report["total"]["kept"] == len(corpus)
    assert report["total"]["held_out"] == corpus.held_out.sum() > 0


def test_pairs_are_held_out_together(built: Path) -> None:
    queries: dict[bool, set[str]] = {True: set(), False: set()}
    for example, held_out in read_examples(built / "dialogues.jsonl"):
        queries[held_out].add(f"{example.source} {first_query(example)}")
    assert queries[True] and not queries[True] & queries[False]


def test_held_out_groups() -> None:
    assert choose_held_out([]) == set()
    assert choose_held_out([5] * 99) == set()
    assert choose_held_out([9, 1, *range(100, 198)]) == {1}
    assert choose_held_out([1, 1, 2, *range(100, 198)]) == {2}  # the pair is one too many
    assert len(choose_held_out(range(100_000))) == 200


def test_the_same_bytes_with_any_number_of_processes(raw: Path, built: Path, tmp_path: Path) -> None:
    make(raw, tmp_path / "two", processes=2)
    assert content(tmp_path / "two") == content(built)
    assert not list(tmp_path.glob(".*"))


def test_a_stopped_build_goes_on(raw: Path, built: Path, tmp_path: Path) -> None:
    """The sources that were whole are not read again; the result is as if nothing had happened."""
    read: list[str] = []

    def stop(what: str, done: int, total: int | None) -> None:
        read.append(what)
        if what == "alpaca":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(raw, tmp_path / "out", tell=stop)
    assert not (tmp_path / "out").exists() and "sharegpt" in read
    read.clear()
    make(raw, tmp_path / "out", tell=lambda what, *_: read.append(what))
    assert "sharegpt" not in read and "hc3" not in read and "alpaca" in read
    assert content(tmp_path / "out") == content(built)


def test_a_stage_is_made_anew_when_its_input_changed(raw: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(raw, tmp_path / "raw")

    def stop(what: str, *_: object) -> None:
        if what == "duplicates":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(mine, tmp_path / "out", tell=stop)
    (mine / "alpaca_data.json").write_text(json.dumps([{"instruction": "one", "input": "", "output": "two"}]))
    read: list[str] = []
    report = make(mine, tmp_path / "out", tell=lambda what, *_: read.append(what))
    assert report["sources"]["alpaca"]["kept"] == 1
    assert "alpaca" in read and "hc3" not in read


def test_killed_at_any_moment(raw: Path, built: Path, tmp_path: Path) -> None:
    """Under the final name there is nothing until all is there; the rerun gives the same bytes."""
    out, random = tmp_path / "out", Random(1)
    code = (
        "import sys; from pathlib import Path; from koala_local.finetune.data.build import build, choose_recipe\n"
        "from koala_local.finetune.data.tokens import DialogueTokenizer\n"
        "raw = Path(sys.argv[1]); print('.', end='', flush=True)\n"
        "tokenizer = DialogueTokenizer(raw / 'tokenizer.model')\n"
        "build(choose_recipe(str(raw / 'mine.toml')), Path(sys.argv[2]), tokenizer, raw=raw, processes=1)"
    )
    kills = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, raw, out], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.read(1) == b"."
        time.sleep(random.uniform(0.02, 0.9))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if out.exists():
            assert content(out) == content(built)
            shutil.rmtree(out)
    make(raw, out)
    assert kills and content(out) == content(built)


def test_an_existing_folder(raw: Path, built: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="exists already"):
        make(raw, built)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(BuildError, match="no corpus"):
        make(raw, precious, force=True)
    assert (precious / "thesis.txt").read_text() == "mine"
    again = shutil.copytree(built, tmp_path / "again")
    (again / "report.json").write_text("{}")
    make(raw, again, force=True)
    assert content(again) == content(built)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "precious"]


def test_a_replacement_that_was_cut_short_keeps_the_old_one(raw: Path, built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / ".out.replaced")  # killed between the two renames
    tokenizer = DialogueTokenizer(raw / "tokenizer.model")
    with pytest.raises(KoalaError):
        build(choose_recipe("koala-distill"), tmp_path / "out", tokenizer, raw=tmp_path / "no")
    assert content(tmp_path / "out") == content(built)


def test_no_space(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(BuildError, match="0 kB free"):
        make(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_builds_of_one_folder(raw: Path, tmp_path: Path) -> None:
    def again(*_: object) -> None:
        with pytest.raises(BuildError, match="another build"):
            make(raw, tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(raw, tmp_path / "out", tell=again)


def test_what_a_build_worked_in_is_locked_until_it_is_gone(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next build could begin in a folder that is being removed."""
    folder, remove, free = tmp_path / ".out.partial", shutil.rmtree, list[bool]()

    def watched(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path) in (folder, folder / "stages"):
            with lock(folder / "lock") as alone:
                free.append(alone)
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    make(raw, tmp_path / "out")
    assert free == [False]
    assert not folder.exists()


def test_a_corpus_that_another_build_made_meanwhile_stays(
    raw: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path) -> Any:
        if path.name == "lock":  # the other build ends before this one has the lock
            shutil.copytree(built, tmp_path / "out")
        return lock(path)

    monkeypatch.setattr("koala_local.finetune.data.build.lock", late)
    with pytest.raises(BuildError, match="exists already"):
        make(raw, tmp_path / "out")
    assert content(tmp_path / "out") == content(built)


def test_a_lock_that_cannot_be_made(raw: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "lock").mkdir(parents=True)
    with pytest.raises(BuildError, match="cannot be written"):
        make(raw, tmp_path / "out")


def test_a_file_of_ones_own(raw: Path, tmp_path: Path) -> None:
    """Nothing is cleaned: it is what its owner wants to train on."""
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps([conversation("Who are you?", "ChatGPT, by OpenAI"), conversation(STORY, "a"),
                                conversation(STORY, "b"), conversation(TESTED, "c")]))  # fmt: skip
    report = build(choose_recipe(str(mine)), tmp_path / "a", DialogueTokenizer(raw / "tokenizer.model"))
    assert report["total"]["kept"] == 4 and not report["decontaminated"]
    sets = [raw / "eval" / "koala_test_set.jsonl"]
    report = build(choose_recipe(str(mine)), tmp_path / "b", DialogueTokenizer(raw / "tokenizer.model"), test_sets=sets)
    assert report["total"]["kept"] == 3 and report["decontaminated"]


PLAIN_RECIPE = """
[sources.asked]
files = ["asked.jsonl"]
duplicates = "near"
[sources.books]
files = ["books.jsonl"]
english = true
keywords = ["openai"]
duplicates = "near"
"""


@pytest.fixture(scope="module")
def plain(raw: Path) -> Path:
    """A corpus of plain text, and of dialogues that ask what the text says."""
    folder, random = raw.parent / "plain", Random(4)
    folder.mkdir()
    said = [STORY, f"{STORY} again", TESTED, f"By OpenAI: {sentence(random)}", GERMAN, " ", STORY.upper(),
            " ".join(sentence(random) for _ in range(20)), *(sentence(random) for _ in range(PLAIN))]  # fmt: skip
    (folder / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    (folder / "asked.jsonl").write_text(json.dumps(conversation(STORY, "A fox.")) + "\n")
    (folder / "plain.toml").write_text(PLAIN_RECIPE)
    recipe = choose_recipe(str(folder / "plain.toml"))
    build(recipe, folder / "out", DialogueTokenizer(raw / "tokenizer.model"), raw=raw, processes=1)
    return folder / "out"


def test_what_stays_of_plain_text(plain: Path) -> None:
    report = json.loads((plain / "report.json").read_text())
    asked, books = report["sources"]["asked"], report["sources"]["books"]
    assert (asked["kept"], asked["texts"], asked["turns"]) == (1, 0, 1)
    # What a dialogue asks is no duplicate of a text, a longer text none either; a test set's query stays.
    assert (books["kept"], books["texts"], books["turns"]) == (PLAIN + 4, PLAIN + 4, 0)
    assert books["removed"] == {"keyword": 1, "language": 1, "contaminated": 0, "exact": 1, "near": 0}
    assert books["skipped"] == {"an empty text": 1} and books["held_out"] == 1
    assert report["decontaminated"]


def test_of_plain_text_all_but_bos_is_trained_once_an_epoch(plain: Path) -> None:
    corpus = open_corpus(plain)
    books = corpus.sources == corpus.source_names.index("books")
    assert (corpus.trained_counts[books] == corpus.lengths[books] - 1).all()
    plan = make_plan(corpus, 32)
    assert plan.pieces.windowed_turns >= 1
    batch = plan.batch(np.arange(plan.rows))
    of_books = np.repeat(books & ~corpus.held_out, corpus.lengths) & corpus.trained.astype(bool)
    asked = int(corpus.trained_counts[~books].sum())
    assert int((batch.weights > 0).sum()) == int(of_books.sum()) + asked == plan.trained_tokens
    assert plan.sources["books"].trained_tokens == int(of_books.sum())
    first = np.flatnonzero(batch.positions.ravel() == 0)[: len(plan.contents)]
    assert set(batch.ids.ravel()[first].tolist()) <= {1, 0}  # every window begins with BOS; 0 is padding


def test_plain_text_is_shown_as_it_is_trained_on(plain: Path) -> None:
    found = look(plain, "books", 0)
    assert found.runs == (("<s>", False), (f" {STORY}</s>", True))
    assert (found.row, found.trained) == ("books.jsonl:1", found.tokens - 1)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"prompt": "a b c d e"}, {"text": "f"}], ["a b c d e", "f"]),
        ([{"instruction": "Sum up.", "instances": [{"input": "x"}, {"input": ""}]}], ["Sum up. x", "Sum up."]),
    ],
)
def test_test_sets_are_read(tmp_path: Path, rows: list[Any], what: list[str]) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [query.text for query in read_set(path)] == what


@pytest.mark.parametrize("text", ['{"question": "a"}', '{"prompt": 3}', '{"prompt": "a"}\n{"pro', "[]", ""])
def test_a_bad_test_set_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(KoalaError):
        read_set(path)


def test_a_keyword_in_a_turn_that_is_dropped_takes_the_conversation(raw: Path, tmp_path: Path) -> None:
    ends = [
        conversation("Hi", "Hello", "Are you ChatGPT?"),
        {"conversations": [{"from": "gpt", "value": "I am OpenAI's."}, *conversation("Hi", "Hello")["conversations"]]},
        conversation("Hi", "Hello", "Bye"),
    ]
    (tmp_path / "sharegpt").mkdir()
    (tmp_path / "sharegpt" / "some.json").write_text(json.dumps(ends))
    (tmp_path / "one.toml").write_text('[sources.sharegpt]\nkeywords = ["openai", "chatgpt"]\n')
    recipe, tokenizer = choose_recipe(str(tmp_path / "one.toml")), DialogueTokenizer(raw / "tokenizer.model")
    sharegpt = build(recipe, tmp_path / "out", tokenizer, raw=tmp_path, processes=1)["sources"]["sharegpt"]
    assert (sharegpt["kept"], sharegpt["removed"]["keyword"]) == (1, 2)
    assert [each["row"] for each in sharegpt["removed_rows"]] == ["some.json[0]", "some.json[1]"]
    assert "dropped" not in (tmp_path / "out" / "dialogues.jsonl").read_text()


def test_published_files_that_are_missing_are_warned_of(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus is of what is there."""
    (tmp_path / "unified_basic.jsonl").write_text(json.dumps({"text": "<human>: Hi\n<bot>: Hello"}))
    (tmp_path / "one.toml").write_text("[sources.oig]\n[sources.identity]\n")
    recipe, tokenizer = choose_recipe(str(tmp_path / "one.toml")), DialogueTokenizer(raw / "tokenizer.model")
    sources = build(recipe, tmp_path / "out", tokenizer, raw=tmp_path, processes=1)["sources"]
    missing = list(SOURCES["oig"].files[:3])
    assert (sources["oig"]["kept"], sources["oig"]["missing"], sources["identity"]["missing"]) == (1, missing, [])
    told = f"koala: warning: OIG is read without these of its published files: {', '.join(missing)}\n"
    assert capsys.readouterr().err == told


def test_a_build_that_fails_leaves_only_what_the_next_one_goes_on_with(raw: Path, tmp_path: Path) -> None:
    tokenizer = DialogueTokenizer(raw / "tokenizer.model")
    with pytest.raises(KoalaError):
        build(choose_recipe("open-source"), tmp_path / "out", tokenizer, raw=raw)  # without OIG: nothing is read
    assert not list(tmp_path.iterdir())

    def stop(what: str, *_: object) -> None:
        if what == "tokens of dialogues":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(raw, tmp_path / "out", tell=stop)
    (left,) = tmp_path.iterdir()
    assert sorted(path.name for path in left.iterdir()) == ["lock", "stages"]  # the mix and its tokens are gone
    assert len(list((left / "stages").glob("*.json"))) == 5


def test_nothing_left_is_an_error(raw: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(BuildError) as caught:
        build(choose_recipe(str(mine)), tmp_path / "out", DialogueTokenizer(raw / "tokenizer.model"))
    assert caught.value.hint == "no user message with a reply: 1"  # and no reason that there was not
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.skipif("KOALA_TEST_DATA" not in os.environ, reason="KOALA_TEST_DATA names no folder of real data")
def test_the_known_leak_of_the_real_data_is_caught(tmp_path: Path) -> None:
    real, raw = Path(os.environ["KOALA_TEST_DATA"]), tmp_path / "raw"
    (raw / "sharegpt").mkdir(parents=True)
    os.symlink(real / "dialogue" / "sharegpt_sample.json.xz", raw / "sharegpt" / "sharegpt_sample.json.xz")
    os.symlink(real / "eval", raw / "eval")
    assert len([query for path in find_sets(raw) for query in read_set(path)]) == 432
    (tmp_path / "one.toml").write_text("[sources.sharegpt]\n")
    tokenizer = real / "models" / "llama_tokenizer.model"
    report = build(choose_recipe(str(tmp_path / "one.toml")), tmp_path / "out", DialogueTokenizer(tokenizer), raw=raw)
    leaks = [found for found in report["sources"]["sharegpt"]["contaminated"] if found["bleu"] == 1]
    assert [found["query"] for found in leaks] == ["Why is it a bad idea to give a mouse a cookie?"]
