"""The pack plan: everything trained once an epoch, nothing across documents, the same rows every time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from koala_local.finetune.data.corpus import Corpus, Counts, Manifest
from koala_local.finetune.data.packing import Batch, PackingError, PackPlan, best_fit, held_out_rows, make_plan


@dataclass(frozen=True)
class Document:
    """`turns` are the tokens of each turn's prompt and reply. Every token of a corpus is another number."""

    turns: tuple[tuple[int, int], ...]
    header: int = 3
    source: int = 0
    held_out: bool = False


def corpus_of(documents: Sequence[Document], names: Sequence[str] = ("sharegpt", "hh")) -> Corpus:
    trained, places, ends, turns = [], [], [0], [0]
    for document in documents:
        mask = [0] * document.header
        for prompt, reply in document.turns:
            places.append((len(mask), len(mask) + prompt))
            mask += [0] * prompt + [1] * reply
        trained += mask
        ends.append(len(trained))
        turns.append(len(places))
    manifest = Manifest("t", 1 << 31, "koala", {}, {}, {name: Counts() for name in names}, {}, key=str(documents))
    return Corpus(
        Path(),
        manifest,
        np.arange(1, len(trained) + 1, dtype=np.uint32),
        np.array(trained, dtype=np.uint8),
        np.array(ends, dtype=np.int64),
        np.array(turns, dtype=np.int64),
        np.array(places, dtype=np.int32).reshape(-1, 2),
        np.array([document.source for document in documents], dtype=np.uint16),
        np.array([document.held_out for document in documents], dtype=np.bool_),
    )


def random_corpus(count: int, seed: int = 0, longest: int = 40) -> Corpus:
    dice = np.random.default_rng(seed)
    made = []
    for number in range(count):
        sizes = dice.integers(1, longest, (int(dice.integers(1, 4)), 2)).tolist()
        made.append(Document(tuple((p, r) for p, r in sizes), source=number % 2, held_out=number % 10 == 9))
    return corpus_of(made)


def whole(plan: PackPlan) -> Batch:
    return plan.batch(np.arange(plan.rows))


def trained_tokens(corpus: Corpus, source: int | None = None) -> Counter[int]:
    """The ids with loss, of what is not held out."""
    of_source = np.ones(len(corpus), bool) if source is None else corpus.sources == source
    kept = np.repeat(~corpus.held_out & of_source, corpus.lengths)
    return Counter(corpus.tokens[kept & corpus.trained.astype(bool)].tolist())


turn = st.tuples(st.integers(0, 30), st.integers(1, 60))  # a plain text has no prompt
document = st.builds(Document, st.lists(turn, min_size=1, max_size=6).map(tuple), st.integers(1, 24))


@given(st.lists(document, min_size=1, max_size=8), st.sampled_from([16, 17, 32, 50, 64, 400]))
def test_every_reply_token_is_trained_once_an_epoch(documents: list[Document], length: int) -> None:
    corpus = corpus_of(documents)
    plan = make_plan(corpus, length)
    batch = whole(plan)
    assert Counter(batch.targets[batch.weights > 0].tolist()) == trained_tokens(corpus)
    assert plan.trained_tokens == sum(trained_tokens(corpus).values())
    assert plan.tokens == batch.tokens
    sequence = plan.batch(np.arange(plan.rows), "sequence")
    assert np.isclose(sequence.weights.sum(), len(documents), rtol=1e-5)  # each dialogue weighs 1, cut or not


@given(st.lists(document, min_size=1, max_size=8), st.sampled_from([16, 33, 64]))
def test_no_target_crosses_a_document(documents: list[Document], length: int) -> None:
    corpus = corpus_of(documents)
    batch = whole(make_plan(corpus, length))
    owner = np.repeat(np.arange(len(corpus)), corpus.lengths)
    for ids, targets, weights, positions, numbers in zip(
        batch.ids, batch.targets, batch.weights, batch.positions, batch.documents, strict=True
    ):
        used = int((numbers >= 0).sum())
        assert (numbers[used:] == -1).all() and not (ids[used:].any() or targets[used:].any() or weights[used:].any())
        assert (targets[weights == 0] == 0).all()
        for number in range(numbers[:used].max() + 1):
            place = np.flatnonzero(numbers == number)
            tokens = ids[place]
            assert (np.diff(place) == 1).all() and (positions[place] == np.arange(len(place))).all()
            assert len(set(owner[tokens - 1].tolist())) == 1  # of one document alone
            assert (np.diff(tokens) > 0).all()  # in its order, nothing twice
            assert weights[place[-1]] == 0
            wanted = weights[place] > 0
            assert (targets[place][wanted] == tokens[1:][wanted[:-1]]).all()


def pieces_of(plan: PackPlan) -> list[list[tuple[int, bool]]]:
    """Of each piece, in the order of the document: its ids, and whether each is trained."""
    batch = whole(plan)
    found = []
    for ids, weights, numbers in zip(batch.ids, batch.weights, batch.documents, strict=True):
        for number in range(int(numbers.max()) + 1):
            place = numbers == number
            trained = [False, *(weights[place][:-1] > 0).tolist()]
            found.append(list(zip(ids[place].tolist(), trained, strict=True)))
    return sorted(found, key=lambda piece: max(token for token, _ in piece))


def test_a_long_dialogue_is_cut_at_turns_and_keeps_its_context() -> None:
    corpus = corpus_of([Document(tuple((4, 6) for _ in range(5)), header=2)])  # 2 + 50 tokens
    plan = make_plan(corpus, 34)  # room for three turns behind the header
    first, second = pieces_of(plan)
    replies = [set(range(7 + 10 * n, 13 + 10 * n)) for n in range(5)]
    assert [token for token, _ in first] == list(range(1, 33))
    assert {token for token, trained in first if trained} == replies[0] | replies[1] | replies[2]
    assert [token for token, _ in second] == [1, 2, *range(23, 53)]  # the header, and a turn as context
    assert {token for token, trained in second if trained} == replies[3] | replies[4]
    assert (plan.pieces.split_documents, plan.pieces.windowed_turns) == (1, 0)
    assert (plan.pieces.repeated_tokens, plan.pieces.unseen_tokens) == (12, 0)
    twice = make_plan(corpus, 34, epochs=2)
    assert twice.cuts == plan.cuts == "1 dialogues longer than a row, between turns; 12 tokens repeated as context"
    assert plan.sources["sharegpt"].documents == 1


def test_a_turn_longer_than_a_sequence_is_windowed_and_reported() -> None:
    corpus = corpus_of([Document(((10, 100),), header=2)])
    plan = make_plan(corpus, 42)
    assert (plan.pieces.split_documents, plan.pieces.windowed_turns) == (1, 1)
    pieces = pieces_of(plan)
    assert [token for token, _ in pieces[0]] == list(range(1, 43))
    for piece in pieces[1:]:
        assert [token for token, _ in piece[:2]] == [1, 2]
        assert sum(not trained for _, trained in piece[2:]) >= 10  # what went before
        tokens = [token for token, _ in piece[2:]]
        assert tokens == list(range(tokens[0], tokens[-1] + 1))


def test_a_plain_text_longer_than_a_sequence_is_windowed_from_its_first_token() -> None:
    plan = make_plan(corpus_of([Document(((0, 100),), header=1)]), 33)  # room for 32 behind BOS
    pieces = pieces_of(plan)
    assert [token for token, _ in pieces[0]] == list(range(1, 34))
    assert all(piece[0] == (1, False) and len(piece) <= 33 for piece in pieces)
    assert [sum(trained for _, trained in piece) for piece in pieces] == [32, 24, 24, 20]
    assert sorted(token for piece in pieces for token, trained in piece if trained) == list(range(2, 102))
    assert (plan.trained_tokens, plan.pieces.repeated_tokens) == (100, 8 + 1 + 8 + 1 + 12 + 1)


@pytest.mark.parametrize(
    ("prompt", "reply", "begins"),
    [(100, 5, 68), (30, 40, 13)],  # longer than a row; and so long that half the row is left for its reply
)
def test_of_a_long_prompt_the_end_is_kept_and_the_rest_is_counted(prompt: int, reply: int, begins: int) -> None:
    plan = make_plan(corpus_of([Document(((prompt, reply),), header=2)]), 42)
    pieces = pieces_of(plan)
    assert [token for token, _ in pieces[0]] == [1, 2, *range(begins, begins + 40)]
    assert plan.pieces.windowed_turns == 1
    seen = {token for piece in pieces for token, _ in piece}
    assert plan.pieces.unseen_tokens == 2 + prompt + reply - len(seen) == begins - 3
    assert plan.pieces.repeated_tokens == sum(map(len, pieces)) - len(seen)
    assert f"{begins - 3} tokens of long prompts and system texts left out" in plan.cuts


def test_a_header_longer_than_half_a_sequence_is_reported() -> None:
    plan = make_plan(corpus_of([Document(((4, 6),) * 4, header=30)]), 32)
    assert plan.pieces.cut_headers == 1 and {piece[0][0] for piece in pieces_of(plan)} == {1}
    assert plan.pieces.unseen_tokens == 29


def test_epochs_and_weights_count() -> None:
    corpus = random_corpus(200)
    plan = make_plan(corpus, 128, epochs=2, weights={"hh": 1.5})
    batch = whole(plan)
    found = Counter(batch.targets[batch.weights > 0].tolist())
    first, second = trained_tokens(corpus, 0), trained_tokens(corpus, 1)
    assert {found[token] for token in first} == {2}
    assert {found[token] for token in second} == {3}  # 1.5 in each epoch: none is left out
    assert found.keys() == first.keys() | second.keys()  # nothing that is held out
    assert plan.sources["sharegpt"].documents == 200 and plan.sources["hh"].documents == 240
    assert sum(share.tokens for share in plan.sources.values()) == plan.tokens
    assert sum(share.trained_tokens for share in plan.sources.values()) == plan.trained_tokens


def test_a_fraction_is_drawn_by_the_seed() -> None:
    corpus = random_corpus(200)
    half = [make_plan(corpus, 128, epochs=0.5, seed=seed) for seed in (1, 1, 2)]
    drawn = [{int(plan.pieces.document[piece]) for piece in plan.contents} for plan in half]
    assert [len(each) for each in drawn] == [90, 90, 90]
    assert drawn[0] == drawn[1] != drawn[2]
    two = make_plan(corpus, 400, epochs=2, weights={"sharegpt": 0.5, "hh": 0})
    assert len(two.contents) == 100 == len(set(two.contents.tolist()))  # not the same half twice


def test_the_same_plan_from_the_same_inputs_and_another_from_others() -> None:
    corpus = random_corpus(100)
    plan, again = make_plan(corpus, 128, epochs=2), make_plan(random_corpus(100), 128, epochs=2)
    assert plan.key == again.key and (plan.contents == again.contents).all()
    others = [
        make_plan(corpus, 129, epochs=2),
        make_plan(corpus, 128, epochs=3),
        make_plan(corpus, 128, epochs=2, seed=1),
        make_plan(corpus, 128, epochs=2, weights={"hh": 2}),
        make_plan(random_corpus(100, seed=1), 128, epochs=2),
        make_plan(replace(corpus, manifest=replace(corpus.manifest, key="of another recipe")), 128, epochs=2),
    ]
    assert len({plan.key, *(other.key for other in others)}) == 7


def test_epochs_are_shuffled_apart() -> None:
    plan = make_plan(random_corpus(100), 128, epochs=2)
    half = len(plan.contents) // 2
    first, second = plan.contents[:half].tolist(), plan.contents[half:].tolist()
    assert sorted(first) == sorted(second) and first != second
    lengths = np.diff(plan.offsets)
    assert not (lengths[: plan.rows // 2] == np.sort(lengths[: plan.rows // 2])).all()


def test_steps_cover_every_row_once() -> None:
    plan = make_plan(random_corpus(100), 128)
    for size in (1, 7, plan.rows, plan.rows + 5):
        rows = [plan.step_rows(step, size).tolist() for step in range(plan.steps(size))]
        assert list(chain.from_iterable(rows)) == list(range(plan.rows))
        assert all(len(each) == size for each in rows[:-1]) and rows[-1]
        for step in (-1, plan.steps(size)):
            with pytest.raises(PackingError, match=f"there is no step {step}"):
                plan.step_rows(step, size)


def test_a_batch_of_some_rows_is_those_rows_of_the_whole() -> None:
    plan = make_plan(random_corpus(60), 64)
    some, everything = plan.batch(plan.step_rows(1, 3)), whole(plan)
    assert (some.ids == everything.ids[3:6]).all() and (some.weights == everything.weights[3:6]).all()
    assert some.ids.dtype == some.targets.dtype == some.positions.dtype == np.int64
    assert some.weights.dtype == np.float32 and some.documents.dtype == np.int32


def test_held_out_documents_are_read_apart() -> None:
    corpus = random_corpus(100)
    plan = held_out_rows(corpus, "hh", 64)
    expected = np.repeat(corpus.held_out, corpus.lengths) & corpus.trained.astype(bool)
    batch = whole(plan)
    assert sorted(batch.targets[batch.weights > 0].tolist()) == corpus.tokens[expected].tolist()
    assert held_out_rows(corpus, "sharegpt", 64).rows == 0  # it has none


def test_best_fit_takes_the_row_with_the_least_room() -> None:
    assert best_fit([7, 6, 3, 4, 2], 10) == ([0, 1, 0, 1, 2], 3)
    assert best_fit([], 10) == ([], 0)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_no_row_overflows_and_none_is_wasted(lengths: list[int]) -> None:
    rows, count = best_fit(sorted(lengths, reverse=True), 50)
    filled = np.bincount(rows, weights=sorted(lengths, reverse=True), minlength=count)
    assert len(filled) == count and (filled <= 50).all()
    assert count < 2 or sum(sorted(filled)[:2]) > 50  # no two rows could have been one


def test_a_mix_of_koalas_size_is_packed_in_seconds() -> None:
    dice = np.random.default_rng(0)
    lengths = np.clip(dice.lognormal(5.6, 0.9, 472_000), 20, 2048).astype(int)
    started = time.process_time()
    _, count = best_fit(np.sort(lengths)[::-1].tolist(), 2048)
    assert time.process_time() - started < 20
    assert lengths.sum() / (count * 2048) > 0.98


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"sequence_length": 15}, "too short"),
        ({"epochs": 0}, "epochs cannot be"),
        ({"epochs": float("nan")}, "epochs cannot be"),
        ({"epochs": float("inf")}, "epochs cannot be"),
        ({"weights": {"alpaca": 1.0}}, "no source 'alpaca'"),
        ({"weights": {"hh": -1.0}}, "weight of hh cannot be"),
        ({"weights": {"hh": float("nan")}}, "weight of hh cannot be"),
        ({"weights": {"hh": 0.0, "sharegpt": 0.0}}, "nothing to train on"),
    ],
)
def test_numbers_that_make_no_plan_are_refused(change: dict[str, object], what: str) -> None:
    options = {"sequence_length": 64, "epochs": 1.0} | change
    with pytest.raises(PackingError, match=what):
        make_plan(random_corpus(20), **options)  # type: ignore[arg-type]


def test_an_empty_corpus_is_refused() -> None:
    for corpus in (corpus_of([]), corpus_of([], names=())):
        with pytest.raises(PackingError, match="nothing to train on"):
            make_plan(corpus, 64)
