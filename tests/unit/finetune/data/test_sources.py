"""Each source's raw rows become the dialogues that the original pipeline made of them; anything else says why not."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from koala_local.finetune.data.examples import Example
from koala_local.finetune.data.sources import (
    OWN,
    SOURCES,
    BadRow,
    RawFileError,
    Skipped,
    Trimmed,
    WrongSchema,
    check,
    identity,
    read_source,
    summarization,
    webgpt,
)

from koala_local.dialogue import BOS, EOS, KOALA, Control, Dialogue, Reply, Turn

from .source_rows import (
    DATA,
    GOOD,
    HUMAN_GPT,
    VECTORS,
    comparison,
    dialogues,
    needs_data,
    read,
    spoken,
    summaries,
    vectors,
)


def reasons(key: str, row: Any, tmp_path: Path) -> list[str]:
    """Why the row is skipped: it stands behind a row that is of the schema."""
    found = read({**SOURCES, "own": OWN}[key], [GOOD[key], row], tmp_path)
    return [each.reason for each in found if isinstance(each, Skipped)]


def conversation(*said: str) -> dict[str, Any]:
    """`said`: such as "human: Hi"."""
    parts = [each.partition(": ") for each in said]
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, _, value in parts]}


# -- what becomes of a row


def test_sharegpt_pairs_and_the_copy_button(tmp_path: Path) -> None:
    row = conversation("human: a\nCopy code\nb", "gpt: python\nCopy code\nx = 1", "human: ok", "gpt:  yes ")
    turns = (Turn("a\nCopy code\nb", "python\n\nx = 1"), Turn("ok", " yes "))
    assert dialogues("sharegpt", row, tmp_path) == [Dialogue(turns)]


def test_sharegpt_ends_are_cut_to_whole_turns(tmp_path: Path) -> None:
    row = conversation("gpt: lost", "gpt: too", "human: Hi", "gpt: Hello", "human: lost")
    assert dialogues("sharegpt", row, tmp_path) == [Dialogue((Turn("Hi", "Hello"),))]


def test_sharegpt_messages_of_one_role_become_one(tmp_path: Path) -> None:
    row = conversation("system: Be kind.", "human: Hi", "human: ", "human: you", "gpt: Hello", "gpt: there")
    assert dialogues("sharegpt", row, tmp_path) == [Dialogue((Turn("Hi\n\nyou", "Hello\n\nthere"),), "Be kind.")]


DROPPING: list[tuple[str, Any, list[tuple[str, ...]]]] = [
    ("sharegpt", conversation("gpt: a", "gpt: b", "human: Hi", "gpt: Hello", "human: c"), [("a\n\nb", "c")]),
    ("sharegpt", conversation("human: Hi", "gpt: Hello"), [()]),
    ("oig", {"text": "<bot>: a\n<human>: Hi\n<bot>: Hello\n<human>: c"}, [("a", "c")]),
    ("hh", GOOD["hh"] | {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: c"}, [("c",), ()]),
    ("own", conversation("system: s", "gpt: a", "human: Hi", "gpt: Hello"), [("a",)]),
    ("own", {"messages": [*GOOD["own"]["messages"], {"role": "user", "content": "c"}]}, [("c",)]),
    ("alpaca", GOOD["alpaca"], [()]),
]


@pytest.mark.parametrize(("key", "row", "dropped"), DROPPING)
def test_what_a_source_drops_of_a_dialogue_comes_with_it(
    tmp_path: Path, key: str, row: Any, dropped: list[tuple[str, ...]]
) -> None:
    found = read({**SOURCES, "own": OWN}[key], [row], tmp_path)
    assert [each.dropped for each in found if isinstance(each, Example)] == dropped


def test_hc3_has_an_example_for_each_answer(tmp_path: Path) -> None:
    row = {"question": "Why?", "human_answers": ["So.", "Hm."], "chatgpt_answers": ["Because."]}
    assert dialogues("hc3", row, tmp_path) == [Dialogue((Turn("Why?", each),)) for each in ("So.", "Hm.", "Because.")]


def test_hc3_keeps_the_answers_beside_an_empty_one(tmp_path: Path) -> None:
    row = {"question": "Why?", "human_answers": [" "], "chatgpt_answers": ["Because."]}
    skipped, example = read(SOURCES["hc3"], [row], tmp_path)
    assert skipped == Skipped("raw.jsonl:1", "an empty reply")
    assert spoken([example]) == [Dialogue((Turn("Why?", "Because."),))]


def test_oig_is_split_at_its_markers(tmp_path: Path) -> None:
    row = {"text": "Background\n<human>: Hi <b>\n\n<bot>:Hello\nyou\n<human>: And?\n<bot>: So."}
    assert dialogues("oig", row, tmp_path) == [Dialogue((Turn("Hi <b>", "Hello\nyou"), Turn("And?", "So.")))]


def test_oig_says_this_models_name(tmp_path: Path) -> None:
    row = {
        "text": "<human>: Are you OIG (Open Instruction Generalist)?\n<bot>: I am OIG (Open Instruction Generalist)."
    }
    (dialogue,) = dialogues("oig", row, tmp_path)
    assert dialogue.turns == (Turn("Are you OIG (Open Instruction Generalist)?", f"I am {identity.DESCRIPTION}."),)


@pytest.mark.parametrize(("given", "user"), [("1, 2", "Add 1, 2"), ("", "Add"), (None, "Add")])
def test_alpaca_joins_instruction_and_input(tmp_path: Path, given: str | None, user: str) -> None:
    row = {"instruction": "Add", "input": given, "output": "3"}
    assert dialogues("alpaca", row, tmp_path) == [Dialogue((Turn(user, "3"),))]


def test_hh_has_a_helpful_and_an_unhelpful_example(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi Human: me\n\nAssistant: Hello\n\nyou"
    row = {
        "chosen": start + "\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": start + "\n\nHuman: Why?\n\nAssistant: Go.",
    }
    first = ("Hi Human: me", "Hello\n\nyou")
    assert dialogues("hh", row, tmp_path) == [
        Dialogue((Turn(*first), Turn("Why?", "So."))),
        Dialogue((Turn(*first, helpful=False), Turn("Why?", "Go.", helpful=False))),
    ]


def test_hh_keeps_one_side_when_the_other_has_no_reply(tmp_path: Path) -> None:
    row = {**GOOD["hh"], "rejected": "\n\nHuman: Hi\n\nAssistant:"}
    example, skipped = read(SOURCES["hh"], [row], tmp_path)
    assert isinstance(example, Example) and skipped == Skipped("raw.jsonl:1", "an empty reply")


@pytest.mark.parametrize("scores", [(0.5, -0.5), (-1, 1)])
def test_webgpt_winner_and_loser_with_their_quotes(tmp_path: Path, scores: tuple[float, float]) -> None:
    row = comparison(score_0=scores[0], score_1=scores[1])
    found = dialogues("webgpt", row, tmp_path)
    quoted, plain = (dialogue.turns[0] for dialogue in (found if scores[0] > 0 else reversed(found)))
    sources = "[1] title: A page content: It is so. [2] title: Another content: It is not. "
    assert quoted.user in [f"Is it so? {lead}{sources}" for lead in webgpt.LEAD_INS]
    assert (quoted.reply, plain.reply, plain.user) == ("Yes [1].", "No.", "Is it so?")
    assert quoted.helpful == (scores[0] > 0) and plain.helpful == (scores[1] > 0)


@pytest.mark.parametrize("choice", [0, 1])
def test_the_chosen_summary_is_the_helpful_one(tmp_path: Path, choice: int) -> None:
    better, worse = (dialogue.turns[0] for dialogue in dialogues("summarization", summaries(choice=choice), tmp_path))
    assert (better.reply, worse.reply) == (("A.", "B.") if choice == 0 else ("B.", "A."))
    assert better.helpful and not worse.helpful
    assert {better.user, worse.user} <= {lead + "A long post." for lead in summarization.LEAD_INS}


OWN_ROWS = [
    (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello\nCopy code\n"},
                {"role": "user", "content": "open"},
            ]
        },
        Dialogue((Turn("Hi", "Hello\nCopy code\n"),), "Be brief."),
    ),
    ({"text": "User: Hi", "conversations": HUMAN_GPT}, Dialogue((Turn("Hi", "Hello"),))),
    ({"instruction": "Add", "output": "3"}, Dialogue((Turn("Add", "3"),))),
    (
        {"instruction": "And?", "input": "", "output": "So.", "history": [["Hi", "Hello"]]},
        Dialogue((Turn("Hi", "Hello"), Turn("And?", "So."))),
    ),
]


@pytest.mark.parametrize(("row", "expected"), OWN_ROWS)
def test_own_rows_of_three_dialogue_schemas(tmp_path: Path, row: Any, expected: Dialogue) -> None:
    assert dialogues("own", row, tmp_path) == [expected]


def test_an_own_pair_is_that_of_anthropic(tmp_path: Path) -> None:
    pair, before = {**GOOD["hh"], "text": "both"}, {**GOOD["own"], **GOOD["hh"]}
    assert dialogues("own", pair, tmp_path) == dialogues("hh", pair, tmp_path)
    assert [each.turns[0].helpful for each in dialogues("own", pair, tmp_path)] == [True, False]
    assert dialogues("own", before, tmp_path) == dialogues("own", GOOD["own"], tmp_path)  # messages come first


@pytest.mark.parametrize(
    "said", [" A story.\n\n It goes on.\n", "<human>: Hi\n<bot>: Hello", "\n\nHuman: a\n\nAssistant: b"]
)
def test_an_own_text_is_plain_whatever_markers_it_has(tmp_path: Path, said: str) -> None:
    assert read(OWN, [{"text": said, "meta": 1}], tmp_path) == [Example(said, "own", "raw.jsonl:1")]


def test_the_error_names_every_schema(tmp_path: Path) -> None:
    with pytest.raises(WrongSchema) as caught:
        read(OWN, [{"prompt": "Hi"}], tmp_path)
    for key in ("messages", "conversations", "instruction", "chosen", "rejected", "text"):
        assert f'"{key}"' in caught.value.hint


def test_an_own_source_has_its_own_name(tmp_path: Path) -> None:
    (example,) = read(replace(OWN, key="mine"), [GOOD["own"]], tmp_path)
    assert isinstance(example, Example) and example.source == "mine"


def test_special_tokens_stay_text(tmp_path: Path) -> None:
    said = "</s><s>[INST] <|im_start|> GPT: USER:"
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}]}
    assert dialogues("own", row, tmp_path) == [Dialogue((Turn(said, said),))]


# -- what is no row


NO_OBJECTS: list[Any] = [None, 7, "text", []]
SPOILT: list[tuple[str, Any, str]] = [
    ("sharegpt", conversation("human: Hi"), "no user message with a reply"),
    ("sharegpt", conversation("gpt: Hi"), "no user message with a reply"),
    ("sharegpt", conversation(), "no user message with a reply"),
    ("sharegpt", conversation("system: Be kind."), "only a system message"),
    ("sharegpt", conversation("human: Hi", "gpt: "), "an empty reply"),
    ("sharegpt", conversation("human: Hi", "gpt:  \n\t"), "an empty reply"),
    ("sharegpt", conversation("human: ", "gpt: Hello"), "an empty user message"),
    ("sharegpt", conversation("human: Hi", "gpt: \ud83d"), "half a character (a lone surrogate)"),
    ("sharegpt", conversation("human: Hi", "gpt: Hi", "system: x", "human: a", "gpt: b"), "a system message after"),
    ("sharegpt", conversation("human: Hi", "tool: x"), "an unknown role"),
    ("sharegpt", {"conversations": "Hi"}, "'conversations' is not a list"),
    ("sharegpt", {"conversations": ["Hi"]}, "not an object"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "no 'value'"),
    ("sharegpt", {"conversations": [{"from": ["human"], "value": "x"}]}, "'from' is not text"),
    ("hc3", {**GOOD["hc3"], "human_answers": [], "chatgpt_answers": []}, "no answers"),
    ("hc3", {**GOOD["hc3"], "human_answers": [None]}, "'human_answers' holds what is not text"),
    ("hc3", {**GOOD["hc3"], "chatgpt_answers": None}, "'chatgpt_answers' is not a list"),
    ("oig", {"text": "<human>: Hi\nRosey: Hello"}, "no user message with a reply"),
    ("oig", {"text": "Hello"}, "no user message with a reply"),
    ("oig", {"text": None}, "'text' is not text"),
    ("alpaca", {"instruction": "Add", "input": ""}, "no 'output'"),
    ("alpaca", {"instruction": "Add", "input": 3, "output": "x"}, "'input' is not text"),
    ("alpaca", {"instruction": " ", "input": "", "output": "x"}, "an empty user message"),
    ("alpaca", {"instruction": "Add", "input": "", "output": float("nan")}, "'output' is not text"),
    ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello"}, "no 'rejected'"),
    ("hh", {"chosen": ["x"], "rejected": "x"}, "'chosen' is not text"),
    ("webgpt", comparison(score_0=0.0, score_1=0.0), "a tie"),
    ("webgpt", comparison(score_0=float("nan")), "'score_0' is no number"),
    ("webgpt", comparison(score_0=True), "'score_0' is no number"),
    ("webgpt", comparison(question="Is it so?"), "not an object"),
    ("webgpt", comparison(quotes_0={"title": ["A"], "extract": []}), "quotes without their titles"),
    ("webgpt", comparison(quotes_0={"title": [1], "extract": ["x"]}), "'title' holds what is not text"),
    ("summarization", summaries(info={"post": None, "article": "x"}), "no post"),
    ("summarization", summaries(info={"article": "x"}), "no post"),
    ("summarization", summaries(info=None), "no post"),
    ("summarization", summaries(choice=2), "not a choice between two summaries"),
    ("summarization", summaries(choice=1.0), "not a choice between two summaries"),
    ("summarization", summaries(choice=True), "not a choice between two summaries"),
    ("summarization", summaries(summaries=[{"text": "A"}]), "not a choice between two summaries"),
    ("summarization", summaries(summaries=["A", "B"]), "not an object"),
    ("identity", {"questions": ["Who?"], "answers": "Koala."}, "'answers' is not a list"),
    ("own", {"messages": [{"role": "system", "content": "x"}]}, "only a system message"),
    ("own", {"messages": [{"role": "user", "content": "x"}]}, "no user message with a reply"),
    ("own", {"messages": [{"role": "tool", "content": "x"}]}, "an unknown role"),
    ("own", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "'content' is not text"),
    ("own", {"prompt": "Hi", "response": "Hello"}, "not of the schema"),
    ("own", {"instruction": "a", "output": "b", "history": [["x"]]}, "'history' is not a list of pairs of texts"),
    ("own", {"instruction": "a", "output": "b", "history": [["x", ""]]}, "an empty reply"),
    ("own", ["x"], "not of the schema"),
    ("own", {"text": ["x"]}, "'text' is not text"),
    ("own", {"text": " \n"}, "an empty text"),
    ("own", {"text": "a \ud83d"}, "half a character (a lone surrogate)"),
    ("own", {"chosen": "Hello", "rejected": "Go."}, "no user message with a reply"),
    ("own", {"chosen": "\n\nHuman: a\n\nAssistant: b"}, "not of the schema"),
    ("own", {"messages": None, "text": "x"}, "'messages' is not a list"),
    *((key, row, "not an object") for key in SOURCES for row in NO_OBJECTS),
]


@pytest.mark.parametrize(("key", "row", "reason"), SPOILT)
def test_a_row_that_cannot_be_used_says_why(tmp_path: Path, key: str, row: Any, reason: str) -> None:
    found = set(reasons(key, row, tmp_path))
    assert len(found) == 1 and found.pop().startswith(reason)


@pytest.mark.parametrize("key", GOOD)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "title", "post", "text"]), inner)
        ),
        max_leaves=8,
    ),
    st.data(),
)
def test_any_value_in_any_place_is_a_row_or_a_reason(key: str, value: Any, data: st.DataObject) -> None:
    row = {**GOOD[key], data.draw(st.sampled_from(sorted(GOOD[key]))): value}
    try:
        for each in {**SOURCES, "own": OWN}[key].dialogues(row, Random(1)):
            check(each.dialogue if isinstance(each, Trimmed) else each)
    except BadRow as error:
        assert len(str(error)) < 60


# -- files


@pytest.mark.parametrize("key", GOOD)
def test_a_file_of_another_schema_says_which_was_expected(tmp_path: Path, key: str) -> None:
    source = {**SOURCES, "own": OWN}[key]
    with pytest.raises(WrongSchema) as caught:
        read(source, [{"prompt": "Hi", "secret": "x" * 500}] * 3, tmp_path)
    assert "raw.jsonl" in caught.value.message and source.title in caught.value.message
    assert "'prompt', 'secret'" in caught.value.message and "xxx" not in caught.value.message
    assert source.schema in caught.value.hint


def test_the_schema_is_looked_for_in_the_first_rows_only(tmp_path: Path) -> None:
    other = {"prompt": "Hi"}
    found = read(SOURCES["alpaca"], [other] * 99 + [GOOD["alpaca"]], tmp_path)
    assert [type(each) for each in found] == [Skipped] * 99 + [Example]
    with pytest.raises(WrongSchema, match="first 100 rows"):
        read(SOURCES["alpaca"], [other] * 100 + [GOOD["alpaca"]], tmp_path)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RawFileError, match="holds no rows"):
        read(SOURCES["hc3"], [], tmp_path)


def test_broken_lines_are_named_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text('{"broken\n' + json.dumps(GOOD["hc3"]) + "\n{}\n")
    first, human, chatgpt, last = read_source(SOURCES["hc3"], [path], seed=1)
    assert (first, last) == (Skipped("all.jsonl:1", "not valid JSON"), Skipped("all.jsonl:3", "no 'question'"))
    assert [each.row for each in (human, chatgpt)] == ["all.jsonl:2"] * 2


def test_rows_of_files_with_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "train.jsonl" for folder in ("harmless-base", "helpful-base", "mine")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(GOOD["hh"]))
    names = [each.row for each in read_source(SOURCES["hh"], paths, seed=1)][::2]
    assert names == ["harmless-base/train.jsonl:1", "helpful-base/train.jsonl:1", "train.jsonl:1"]


def test_draws_follow_from_seed_source_and_row_alone(tmp_path: Path) -> None:
    lines = [json.dumps(summaries(info={"post": f"Post {n}."})) + "\n" for n in range(60)]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_text("".join(lines))
    paths[1].write_text("".join(lines))
    source = SOURCES["summarization"]
    together = list(read_source(source, paths, seed=7))
    assert together == [each for path in paths for each in read_source(source, [path], seed=7)]
    packed = tmp_path / "packed" / "a.jsonl.xz"
    packed.parent.mkdir()
    packed.write_bytes(lzma.compress(paths[0].read_bytes()))
    assert together[:120] == list(read_source(source, [packed], seed=7))
    assert together != list(read_source(source, paths, seed=8))
    texts = [dialogue.turns[0].user for dialogue in spoken(together)]
    assert texts[:120] != texts[120:]
    leads = {text.partition("Post")[0] for text in texts}
    assert leads == set(summarization.LEAD_INS)


def test_the_published_counts_are_those_of_the_post() -> None:
    assert list(SOURCES) == ["sharegpt", "hc3", "oig", "alpaca", "hh", "webgpt", "summarization", "identity"]
    assert sum(source.published for source in SOURCES.values()) == 472_000 + 850  # the post does not count identity
    assert all(source.key == key and source.licence and source.schema for key, source in SOURCES.items())


# -- against what the original pipeline made


def tokens(tokenizer: Any, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """The ids of the dialogue's segments, each tokenized on its own, and 1 for every id that a loss is taken on."""
    ids: list[int] = []
    mask: list[int] = []
    for segment in KOALA.segments(dialogue):
        if isinstance(segment, Control):
            new = [tokenizer.bos_id() if segment == BOS else tokenizer.eos_id()]
        else:
            new = tokenizer.encode(segment.text)
        ids += new
        mask += [int(isinstance(segment, Reply) or segment == EOS)] * len(new)
    return ids, mask


@needs_data
@pytest.mark.parametrize("stem", VECTORS)
def test_dialogues_are_those_of_the_original_pipeline(stem: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "models/llama_tokenizer.model"))
    found = vectors(stem)
    assert len(found) == 24
    for dialogue, ids, mask in found:
        assert tokens(tokenizer, dialogue) == (ids, mask)


@needs_data
def test_a_real_row_of_summaries_is_read() -> None:
    path = DATA / "dialogue/summarize_from_feedback_one_row.jsonl"
    better, worse = (dialogue.turns[0] for dialogue in spoken(read_source(SOURCES["summarization"], [path], seed=1)))
    assert (better.reply or "").startswith("we suspect other party")
    assert better.helpful and not worse.helpful
