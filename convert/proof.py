"""An output put to the test: its own engine and the source's forward pass read the same held text.

It runs what `koala chat` would run, so that what is proved is what will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koala_local import console

from .calibration import Sample, Tokenizer, builtin_held_out, make_sample
from .estimate import estimate
from .verify import Comparison, VerificationError, check, compare, streamed_logits

if TYPE_CHECKING:
    from koala_local.models.configuration import ModelConfig

    from .sources.architecture import Checkpoint

_HELD_LENGTH = 512  # tokens of a sequence of the held text
_VERIFY_SECONDS = 180.0  # what the source's pass and the output's may take together
_UNPACK_SECONDS = 2e-9  # a weight, by our GPTQ layers on a CPU; llama.cpp unpacks within its products
_UNPACK_TOKENS = 64  # that are computed with what was unpacked once


def prove(
    checkpoint: Checkpoint, source: Path, folder: Path | None, written: Path, kind: str
) -> tuple[Comparison, str]:
    """Reload the output in its engine and compare its predictions on the held text with the source's: the figures, and
    which text. Raises VerificationError."""
    with _engine(written, _HELD_LENGTH) as engine:
        with source_tokenizer(source, folder, checkpoint.config) as tokenizer:
            sample = _held_sample(checkpoint.config, tokenizer, unpacked=_unpacked(checkpoint, written))
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


def _held_sample(config: ModelConfig, tokenizer: Tokenizer, *, unpacked: int) -> Sample:
    """As much of the held text as the source and the output read in a few minutes. The output's pass is counted like
    the source's (llama.cpp's products on a CPU are about as fast as those in float32) and, on top, what it takes to
    unpack so many weights for every few tokens."""
    length = min(_HELD_LENGTH, config.context, config.sliding_window or _HELD_LENGTH)  # a GGUF attends to all of it
    unpacking = unpacked * _UNPACK_SECONDS * ceil(length / _UNPACK_TOKENS)  # for each sequence
    seconds = 2 * estimate(config, length, length).seconds + unpacking
    most = min(64, max(1, int(_VERIFY_SECONDS / max(seconds, 1e-3))))
    sample = make_sample(builtin_held_out(), tokenizer, length=length, most=most)
    cost = estimate(config, sample.tokens, length)
    cost = replace(cost, seconds=2 * cost.seconds + len(sample.sequences) * unpacking)
    console.note(f"verification: {sample}; {cost}")
    return sample


def _unpacked(checkpoint: Checkpoint, written: Path) -> int:
    """The weights that our own engine unpacks while it computes: those of a GPTQ folder's layers; on a GPU it takes no
    time that counts."""
    if not written.is_dir() or torch.cuda.is_available():
        return 0
    return sum(prod(info.shape) for name, info in checkpoint.tensors.items() if name.endswith("_proj.weight"))


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
