"""An output put to the test: its own engine and the source's forward pass read the same held text.

It runs what `koala chat` would run, so that what is proved is what will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala_local import console

from .calibration import Sample, Tokenizer, builtin_held_out, make_sample
from .estimate import estimate
from .verify import Comparison, VerificationError, check, compare, streamed_logits

if TYPE_CHECKING:
    from koala_local.models.configuration import ModelConfig

    from .sources.architecture import Checkpoint

_HELD_LENGTH = 512  # tokens of a sequence of the held text
_VERIFY_SECONDS = 180.0  # what the source's forward pass may take


def prove(
    checkpoint: Checkpoint, source: Path, folder: Path | None, written: Path, kind: str
) -> tuple[Comparison, str]:
    """Reload the output in its engine and compare its predictions on the held text with the source's: the figures, and
    which text. Raises VerificationError."""
    with _engine(written, _HELD_LENGTH) as engine:
        with source_tokenizer(source, folder, checkpoint.config) as tokenizer:
            sample = _held_sample(checkpoint.config, tokenizer)
            _check_round_trip(engine.tokenize, tokenizer)
        with console.progress("source", "layer") as step:
            logits = streamed_logits(checkpoint, sample.sequences, step)
        with console.progress("comparing", "sequence") as step:
            comparison = compare(logits, engine.all_logits, sample.sequences, step)
    check(comparison, kind)
    return comparison, str(sample)


@contextmanager
def source_tokenizer(source: Path, folder: Path | None, config: ModelConfig) -> Iterator[Tokenizer]:
    """The source's own tokenizer: that of its folder, or llama.cpp's where the source is a GGUF."""
    if folder is None:
        with _engine(source, 256) as engine:
            yield Tokenizer(engine.tokenize, engine.vocabulary.bos, engine.vocabulary.eos)
    else:
        from koala_local.engine.gptq_tokenizer import Expected, GptqTokenizer

        tokenizer = GptqTokenizer(folder, Expected(config.vocabulary_size, config.bos, config.eos))
        yield Tokenizer(tokenizer.tokenize, tokenizer.vocabulary.bos, tokenizer.vocabulary.eos)


def _held_sample(config: ModelConfig, tokenizer: Tokenizer) -> Sample:
    """As much of the held text as the source's forward pass reads in a few minutes."""
    length = min(_HELD_LENGTH, config.context)
    seconds = estimate(config, length, length).seconds
    most = min(64, max(1, int(_VERIFY_SECONDS / max(seconds, 1e-3))))
    sample = make_sample(builtin_held_out(), tokenizer, length=length, most=most)
    console.note(f"verification: {sample}; {estimate(config, sample.tokens, length)}")
    return sample


@contextmanager
def _engine(path: Path, context: int) -> Iterator[Any]:
    """The engine that `koala chat` would run the model with."""
    if path.is_dir():
        from koala_local.engine.gptq import load_gptq

        with closing(load_gptq(path, max(context, 256))) as gptq:
            yield gptq
        return
    from koala_local.engine.llama import LlamaEngine, Placement
    from koala_local.models.gguf_header import read_header
    from koala_local.models.load_probe import probe

    fingerprint = read_header(path).fingerprint
    probe(path)
    with closing(LlamaEngine(path, fingerprint, Placement(context=max(context, 256)))) as engine:
        yield engine


def _check_round_trip(written: Callable[[str], list[int]], source: Tokenizer) -> None:
    for document in builtin_held_out().documents:
        text = str(document)
        if written(text) != list(source.encode(text)):
            raise VerificationError(
                "the written vocabulary tokenizes a text in another way than the source's tokenizer",
                "please report which tokenizer this is",
            )
