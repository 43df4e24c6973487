"""Going on with a saved conversation against evaluating it: `Conversation.resume` reads the turns from SQLite, checks
the KV file's length and SHA-256 and loads it; the peer evaluates the same tokens into an empty cache.

The file was written just before, so it comes from the page cache: a slow disk adds the time to read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.models import Model
from benchmarks.table import Row
from benchmarks.talk import numbered
from koala_local.chat.conversation import Conversation
from koala_local.chat.history import History
from koala_local.chat.kv_files import KvFiles
from koala_local.chat.ledger import Ledger
from koala_local.dialogue import KOALA
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling

_SENTENCES = 8  # a message: the history is mostly read, which is faster than to have it written


def run(model: Model, quick: bool) -> list[Row]:
    """Rows for one model."""
    with TemporaryDirectory() as folder, closing(model.endless_engine()) as engine:
        files = Path(folder, "kv")
        first = _conversation(engine, Path(folder))
        while len(first.ledger.cache.ids) < (600 if quick else 3000):
            first.send(numbered(len(first.path()), _SENTENCES), lambda _: None)
        saving = _seconds(first.save)
        session, ids = first.session, list(first.ledger.cache.ids)
        assert session is not None
        size = sum(path.stat().st_size for path in files.iterdir())
        first.new()
        resuming = [_resume(first, session.id, ids) for _ in range(3 if quick else 9)]
        evaluating = [_evaluate(first.ledger, ids) for _ in range(1 if quick else 3)]
        first.history.close()
    slow, fast = 1000 * median(evaluating), 1000 * median(resuming)
    name = f"resume {len(ids)} tokens, {model.name}"
    note = f"KV file {size / 1e6:.0f} MB, saved in {1000 * saving:.0f} ms"
    return [Row(name, fast, "ms", slow, "evaluating them", slow / fast, at_least=10, note=note)]


def _conversation(engine: LlamaEngine, folder: Path) -> Conversation:
    ledger, files = Ledger(engine, KOALA), KvFiles(folder / "kv")
    history, sampling = History.open(folder), Sampling(max_tokens=4)
    return Conversation(ledger, history, files, model="benchmark", sampling=sampling, note=_fail, seed=1)


def _fail(note: str) -> None:
    """The conversation has nothing to tell unless saving or resuming failed."""
    raise RuntimeError(note)


def _resume(conversation: Conversation, session: str, ids: list[int]) -> float:
    """Seconds to resume; the cache is empty before and after."""
    seconds = _seconds(lambda: conversation.resume(session))
    if conversation.ledger.cache.ids != ids:
        raise RuntimeError("the resumed conversation has other tokens")
    conversation.new()
    conversation.ledger.cache.clear()
    return seconds


def _evaluate(ledger: Ledger, ids: list[int]) -> float:
    ledger.cache.clear()
    return _seconds(lambda: ledger.cache.extend(ids))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
