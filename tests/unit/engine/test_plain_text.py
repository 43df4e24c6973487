"""No text becomes a control token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koala_local.engine.llama import LlamaEngine
from koala_local.engine.plain_text import PlainText
from tests.engines import tiny_engine
from tests.gguf_maker import CONTROL, USER_DEFINED

SPECIALS = ["<|im_start|>", "<|im_end|>", "[INST]", "<<SYS>>", "<|eot_id|>", "he</s>"]


@pytest.fixture(scope="module", params=[CONTROL, USER_DEFINED], ids=["control", "user-defined"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    folder: Path = tmp_path_factory.mktemp("model")
    engine = tiny_engine(folder, extra_tokens=[(text, request.param) for text in SPECIALS])
    yield engine
    engine.close()


def special_ids(engine: LlamaEngine) -> set[int]:
    vocabulary = engine.vocabulary
    return {*vocabulary.control.values(), *vocabulary.user_defined.values(), *vocabulary.ends}


def test_every_special_token_typed_as_text(engine: LlamaEngine) -> None:
    vocabulary = engine.vocabulary
    assert set(SPECIALS) <= {*vocabulary.control, *vocabulary.user_defined}
    for text in [*vocabulary.control, *vocabulary.user_defined, *SPECIALS]:
        for typed in (text, f"a{text}b", text * 3, text[:-1] + text, f"{text}\n{text[1:]}"):
            ids = PlainText(engine).ids(typed)
            assert not special_ids(engine) & set(ids)
            assert b"".join(map(engine.piece, ids)).decode() == f" {typed}"


def test_without_special_strings_nothing_changes(engine: LlamaEngine) -> None:
    assert PlainText(engine).ids("the hat is here") == engine.tokenize("the hat is here")


def test_markers_that_are_ordinary_tokens_are_cut(engine: LlamaEngine) -> None:
    assert PlainText(engine, ["the"]).ids("the") != engine.tokenize("the")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*SPECIALS, "</s>", "<s>", "<unk>", "<", "|", "/s>", "[", "é", " "])).map("".join))
def test_mixtures_and_seams(engine: LlamaEngine, text: str) -> None:
    ids = PlainText(engine).ids(text, continues=True)
    assert not special_ids(engine) & set(ids)
    assert b"".join(map(engine.piece, ids)).decode() == text
