"""The models that are measured: the bundled miniature, and a LLaMA of 160M random weights made here once.

Random weights decode as fast as trained ones. The shape is that of a small published LLaMA: large enough that reading
its weights takes the time, as with any larger model; the miniature shows what the program itself costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import llama_cpp.llama_cpp as ll

from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.models.gguf_header import read_header
from tests.gguf_maker import make_model, vocabulary

RUNS = Path(__file__).resolve().parents[1] / "runs" / "benchmarks"  # git ignores it
CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """A LLaMA architecture without grouped-query attention or tied embeddings."""

    name: str
    embedding: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All weights, norms included."""
        block = 4 * self.embedding**2 + 3 * self.embedding * self.feed_forward + 2 * self.embedding
        return 2 * self.vocabulary * self.embedding + self.layers * block + self.embedding


LLAMA_160M = Shape("llama-160m-random", embedding=768, layers=12, heads=12, feed_forward=3072, vocabulary=32_000)


@dataclass(frozen=True, slots=True)
class Model:
    """A model file and what the table calls it."""

    name: str
    path: Path

    def endless_engine(self, context: int = CONTEXT) -> LlamaEngine:
        """The model loaded as the program loads it, but no token ends a reply: its length is `max_tokens`."""
        engine = LlamaEngine(self.path, read_header(self.path).fingerprint, Placement(context))
        engine.vocabulary = engine.vocabulary._replace(ends=frozenset())
        return engine


def random_model(shape: Shape, folder: Path = RUNS) -> Path:
    """The path of a random Q4_K_M model of this shape in `folder`, made unless it is there. Raises OSError."""
    path = folder / f"{shape.name}-q4_k_m.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        full, small = Path(temporary, "f32.gguf"), Path(temporary, "q4_k_m.gguf")
        make_model(
            full,
            name=shape.name,
            context=CONTEXT,
            extra_tokens=words(shape.vocabulary - len(vocabulary())),
            embedding=shape.embedding,
            layers=shape.layers,
            heads=shape.heads,
            feed_forward=shape.feed_forward,
        )
        _quantize(full, small)
        os.replace(small, path)
    return path


def words(count: int) -> list[tuple[str, int]]:
    """`count` pieces as in a SentencePiece vocabulary: syllables, pairs of them, with and without a space before.
    Every piece can be merged from shorter ones."""
    return [(piece, int(gguf.TokenType.NORMAL)) for piece in islice(_pieces(), count)]


def _pieces() -> Iterator[str]:
    known = {text.decode("utf-8") for text, _, _ in vocabulary()}
    syllables = ["".join(pair) for pair in product("bdfghjklmnprstvwyzcx", "aeiou")]
    pairs = ["".join(pair) for pair in product(syllables, repeat=2)]
    for part in (syllables, pairs, [f"{pair}{end}" for end in "nsr" for pair in pairs]):
        yield from (piece for piece in part if piece not in known)
        yield from (f"\u2581{piece}" for piece in part if f"\u2581{piece}" not in known)


def _quantize(source: Path, target: Path) -> None:
    params = ll.llama_model_quantize_default_params()
    params.ftype = ll.LLAMA_FTYPE_MOSTLY_Q4_K_M
    silence()
    if ll.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise OSError(f"llama.cpp could not quantize {source.name}")


def silence() -> None:
    """Nothing of llama.cpp's log is shown."""
    ll.llama_log_set(_ignore, None)


@ll.llama_log_callback  # type: ignore[untyped-decorator]
def _ignore(level: int, text: bytes, _: object) -> None:
    pass
