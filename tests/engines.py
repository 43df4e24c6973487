"""Real engines on tiny random models, for tests."""

from __future__ import annotations

from pathlib import Path

from koala_local.engine.llama import LlamaEngine, Placement
from tests.gguf_maker import make_model


def tiny_engine(folder: Path, *, context: int = 512, **model: object) -> LlamaEngine:
    """An engine on a new random model in `folder`."""
    path = make_model(folder / f"tiny-{len(list(folder.iterdir()))}.gguf", context=context, **model)  # type: ignore[arg-type]
    return LlamaEngine(path, "test", Placement(context=context, threads=1))
