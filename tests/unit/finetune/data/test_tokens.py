"""Token ids and loss masks of dialogues, held against sentencepiece by hand, against chat, and against real vectors."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from koala_local.finetune.data.sources import SOURCES
from koala_local.finetune.data.tokens import DialogueTokenizer, TokenizerError, check_matches
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from koala_local.chat.ledger import Exchange, Ledger
from koala_local.dialogue import FORMATS, KOALA, Dialogue, PromptFormat, Turn
from koala_local.engine.gptq import GptqEngine, load_gptq
from koala_local.engine.gptq_tokenizer import Expected, GptqTokenizer
from koala_local.errors import ModelFileError
from tests.gptq_maker import Made, make_gptq

from .source_rows import DATA, GOOD, VECTORS, dialogues, needs_data, vectors
from .tokenizer_maker import train_sentencepiece

_PARTS = ["the", " cat", "cat", " ", "\n", "  ", "\t", "\r\n", " \n ", "é", "\u3000", "☃", "mat"]
USER_DEFINED, CONTROLS = ["<think>", "[INST]"], ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("plain") / "tokenizer.model")


def save_byte_level(path: Path) -> Path:
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", *CONTROLS)])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in USER_DEFINED])  # matched in any text
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def special(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DialogueTokenizer:
    """With more special tokens than it needs."""
    folder = tmp_path_factory.mktemp("special")
    if request.param == "byte-level":
        return DialogueTokenizer(save_byte_level(folder / "tokenizer.json"))
    return DialogueTokenizer(train_sentencepiece(folder / "any name.model", control_symbols=CONTROLS))


@cache
def load(path: Path, format: PromptFormat = KOALA) -> DialogueTokenizer:
    return DialogueTokenizer(path, format=format)


def by_hand(model: Path, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Koala's ids and mask as its authors' code makes them: field by field, joined as ids."""
    tokenizer: Any = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids, mask = [tokenizer.bos_id()], [0]
    start = "BEGINNING OF CONVERSATION: " + (dialogue.system + " " if dialogue.system else "")
    for turn in dialogue.turns:
        marker = " GPT:" if turn.helpful else " An Unhelpful Answer:"
        prompt = tokenizer.encode(start + "USER: " + turn.user + marker)
        reply = [*tokenizer.encode(turn.reply), tokenizer.eos_id()]
        ids, mask = ids + prompt + reply, mask + [0] * len(prompt) + [1] * len(reply)
        start = ""
    return ids, mask


ODD = "nul \0, lone \ud800, \U0001f428 \u4f60\u597d\n\n\ttab  two spaces "
STYLES = {
    "sharegpt": Dialogue((Turn("Hi there", "Hello!\n\n```\ncode\n```"), Turn("more?", "  Sure "), Turn("x", "y"))),
    "hc3": Dialogue((Turn("Why is the sky blue ? Please explain", "Basically , because of Rayleigh"),)),
    "oig": Dialogue((Turn("What is 2 + 2?", "It is 4."), Turn("Thanks", "You're welcome"))),
    "alpaca": Dialogue((Turn("Sort these: a, c, b", "a, b, c"),)),
    "hh": Dialogue((Turn("how", "no", False), Turn("why", "because", False))),
    "webgpt": Dialogue((Turn("Q? [1] title: T content: E ", "an answer [1]"),)),
    "summarization": Dialogue((Turn("Summarize the following text: long\npost", "short", False),)),
    "identity": Dialogue((Turn("Who are you?", "I am Koala."),)),
    "system": Dialogue((Turn("hi", "Arr"), Turn("hi", "Arr")), "Talk like a pirate."),
    "odd": Dialogue((Turn(ODD, ODD), Turn("", " ")), ODD),
}


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_mask_are_those_made_by_hand(plain: Path, style: str) -> None:
    dialogue = STYLES[style]
    clean = Dialogue(tuple(Turn(_utf8(t.user), _utf8(t.reply or ""), t.helpful) for t in dialogue.turns))
    found = load(plain).encode(dialogue)
    ids, mask = by_hand(plain, Dialogue(clean.turns, _utf8(dialogue.system)))
    assert found.ids == ids
    assert list(found.trained) == mask


@pytest.mark.parametrize("key", [*SOURCES, "own"])
def test_a_raw_row_of_every_source_has_the_ids_made_by_hand(plain: Path, tmp_path: Path, key: str) -> None:
    found = dialogues(key, GOOD[key], tmp_path)
    assert {turn.helpful for dialogue in found for turn in dialogue.turns} == (
        {True, False} if key in ("hh", "webgpt", "summarization") else {True}
    )
    for dialogue in found:
        encoded = load(plain).encode(dialogue)
        assert (encoded.ids, list(encoded.trained)) == by_hand(plain, dialogue)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("text", ["A story.\n\nIt goes on. ", " x", "</s><s> USER: hi GPT: ho", "nul \0, \U0001f428"])
def test_all_of_a_plain_text_is_learned(plain: Path, text: str) -> None:
    tokenizer: Any = sentencepiece.SentencePieceProcessor(model_file=str(plain))
    found = load(plain).encode(text)
    assert found.ids[0] == tokenizer.bos_id() and found.ids[-1] == tokenizer.eos_id()
    assert not {tokenizer.bos_id(), tokenizer.eos_id()} & set(found.ids[1:-1])
    assert tokenizer.decode(found.ids[1:-1]) == text
    assert list(found.trained) == [0] + [1] * (len(found.ids) - 1)
    assert (found.prompts, found.replies) == ([1], [1])


def test_without_a_bos_the_first_token_of_a_plain_text_is_not_learned(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "tokenizer.json")
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = DialogueTokenizer(tmp_path)
    found = tokenizer.encode("abc")
    assert [tokenizer.piece(token) for token in found.ids[:-1]] == [b"a", b"b", b"c"]
    assert (list(found.trained), found.prompts, found.replies) == ([0, 1, 1, 1], [0], [1])


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ({}, True),
        ({"split_by_whitespace": False, "vocab_size": 600}, False),  # tokens of several words
        ({"model_type": "unigram"}, False),
        ({"normalization_rule_name": "nmt_nfkc"}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"byte_fallback": False}, False),
    ],
)
def test_words_are_remembered_only_where_that_changes_no_id(
    tmp_path: Path, options: dict[str, Any], apart: bool
) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    assert GptqTokenizer(tmp_path, Expected(None, None, ())).apart == apart
    tokenizer, reference = DialogueTokenizer(model), sentencepiece.SentencePieceProcessor(model_file=str(model))
    dice = Random(4)
    for _ in range(300):
        text = "".join(dice.choices(_PARTS, k=12))
        assert tokenizer.encode(text).ids == [1, *reference.encode(text), 2], text


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_turns_can_be_taken_apart(plain: Path, system: str) -> None:
    """Header and turns are where they are said to be: without its first turn, a dialogue is header and rest."""
    tokenizer = load(plain)
    turns = STYLES["sharegpt"].turns
    whole, rest = (tokenizer.encode(Dialogue(some, system)) for some in (turns, turns[1:]))
    header = whole.prompts[0]
    assert whole.ids[:header] + whole.ids[whole.prompts[1] :] == rest.ids
    assert rest.prompts[0] == header
    for prompt, reply, end in zip(whole.prompts, whole.replies, [*whole.prompts[1:], len(whole.ids)], strict=True):
        assert set(whole.trained[prompt:reply]) == {0} and set(whole.trained[reply:end]) == {1}
        assert whole.ids[end - 1] == tokenizer.eos


def test_a_prompt_ends_where_its_reply_begins(plain: Path) -> None:
    found = load(plain).encode(Dialogue((Turn("a", "b"), Turn("c"))))
    assert found.replies[-1] == len(found.ids) and len(found.prompts) == 2
    assert not any(found.trained[found.prompts[1] :])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_gptq(tmp_path_factory.mktemp("made") / "koala-4bit")


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[GptqEngine]:
    engine = load_gptq(made.folder, 64)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("style", ["sharegpt", "hh", "system", "odd"])
def test_training_sees_the_ids_that_chat_sends(made: Made, engine: GptqEngine, name: str, style: str) -> None:
    format, dialogue = FORMATS[name], STYLES[style]
    found = load(made.folder, format).encode(dialogue)
    assert found.ids == Ledger(engine, format).ids(dialogue.system, [Exchange(turn) for turn in dialogue.turns])


def test_a_byte_level_tokenizer_keeps_its_spaces_as_in_chat(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    save_byte_level(folder / "tokenizer.json")
    dialogue = STYLES["sharegpt"]
    mine = DialogueTokenizer(folder)
    found = mine.encode(dialogue)
    text = "BEGINNING OF CONVERSATION: USER: Hi there GPT: Hello!"
    assert b"".join(map(mine.piece, found.ids)).decode().startswith(text)
    engine = load_gptq(folder, 64)
    assert found.ids == Ledger(engine, KOALA).ids("", [Exchange(turn) for turn in dialogue.turns])
    engine.close()


def test_no_special_token_is_learned_from_a_text(special: DialogueTokenizer) -> None:
    vocabulary = special.vocabulary
    texts = [*vocabulary.control, *vocabulary.user_defined]
    assert {"<s>", "</s>", *CONTROLS} <= set(texts)
    for text in texts:
        _holds_no_control(special, f"{text} a{text}{text}", text, f"{text}x")


@given(st.data())
def test_no_mixture_of_texts_makes_a_control_token(special: DialogueTokenizer, data: st.DataObject) -> None:
    bits = st.sampled_from([*special.vocabulary.control, *USER_DEFINED, "<", "s>", "</", "\ud800", "\0", " ", "\u2581"])
    text = st.lists(bits | st.text(max_size=3), max_size=6).map("".join)
    _holds_no_control(special, *(data.draw(text) for _ in range(3)))


def _holds_no_control(tokenizer: DialogueTokenizer, user: str, reply: str, system: str) -> None:
    found = tokenizer.encode(Dialogue((Turn(user, reply), Turn(user, reply)), system))
    allowed = {0, found.prompts[1] - 1, len(found.ids) - 1}  # BOS, and the end of each reply
    forbidden = {*tokenizer.vocabulary.control.values(), *tokenizer.vocabulary.user_defined.values()}
    assert {place for place, token in enumerate(found.ids) if token in forbidden} == allowed
    assert found.trained[found.prompts[1] - 1] == found.trained[-1] == 1


def test_the_key_tells_tokenizers_apart(plain: Path, made: Made, tmp_path: Path) -> None:
    first = load(plain)
    (tmp_path / "tokenizer.model").write_bytes(plain.read_bytes())
    (tmp_path / "config.json").write_text('{"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1}')
    padded = DialogueTokenizer(tmp_path, 512)  # rows that no token has are no other tokenizer
    assert (padded.key, padded.size, padded.bos, padded.eos) == (first.key, first.size, 1, 2)
    assert first.key != load(made.folder).key
    again = pickle.loads(pickle.dumps(padded))
    assert again.key == padded.key and again.encode(STYLES["hh"]) == padded.encode(STYLES["hh"])


def test_what_is_no_tokenizer_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        DialogueTokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="does not exist"):
        DialogueTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(TokenizerError, match=r"is no tokenizer\.model"):
        DialogueTokenizer(tmp_path / "notes.txt")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ModelFileError, match="is no"):
            DialogueTokenizer(tmp_path / name)


def test_a_tokenizer_that_does_not_match_the_embedding_is_refused(plain: Path) -> None:
    tokenizer = load(plain)
    check_matches(tokenizer, tokenizer.size)
    with pytest.raises(
        TokenizerError, match=f"has {tokenizer.size} tokens, the model's embedding {tokenizer.size - 1}"
    ):
        DialogueTokenizer(plain, tokenizer.size - 1)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_tokenizer_without_bos_or_eos_is_refused(tmp_path: Path, name: str) -> None:
    path = train_sentencepiece(tmp_path / "tokenizer.model", **{f"{name}_id": -1})
    with pytest.raises(TokenizerError, match=f"names no {name.upper()} token"):
        DialogueTokenizer(path)


@needs_data
@pytest.mark.parametrize("stem", VECTORS)
def test_the_original_code_made_the_same(stem: str) -> None:
    tokenizer = load(DATA / "models" / "llama_tokenizer.model")
    found = vectors(stem)
    assert len(found) == 24
    for dialogue, ids, mask in found:
        encoded = tokenizer.encode(dialogue)
        assert (encoded.ids, list(encoded.trained)) == (ids, mask)
