"""What the tests of the slash commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from koala_local.chat.conversation import Conversation
from koala_local.chat.history import History
from koala_local.chat.kv_files import KvFiles
from koala_local.chat.ledger import Ledger
from koala_local.chat.loader import LoadedModel
from koala_local.dialogue import KOALA
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling
from koala_local.models.gguf_header import read_header
from tests.engines import tiny_engine
from tests.gguf_maker import make_model
from tests.unit.chat.recorder import Recorder


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def koala_model(shared_engine: LlamaEngine, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = make_model(tmp_path_factory.mktemp("header") / "koala-test.gguf", name="Koala \x1b[31mtest")
    return LoadedModel(path, read_header(path), shared_engine, KOALA, "the model is called Koala")


@pytest.fixture
def front(shared_engine: LlamaEngine, koala_model: LoadedModel, tmp_path: Path) -> Iterator[Recorder]:
    history = History.open(tmp_path / "data")
    conversation = Conversation(
        Ledger(shared_engine, KOALA),
        history,
        KvFiles(tmp_path / "kv"),
        model="tiny",
        sampling=Sampling(temperature=1.0, max_tokens=6),
        note=lambda text: None,
        seed=1,
    )
    yield Recorder(conversation, koala_model)
    history.close()
