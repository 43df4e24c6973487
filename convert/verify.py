"""Is the quantized model still the model? Perplexity and KL divergence of an output against its source on a held text.

sample = make_sample(builtin_held_out(), tokenizer, length=512)
source = streamed_logits(checkpoint, sample.sequences)
output = streamed_logits(open_checkpoint(written), sample.sequences)  # or an engine's logits, as a `LogitsOf`
check(compare(source, output, sample.sequences), "Q4_K_M")            # raises VerificationError
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from koala_local.errors import KoalaError

from .forward import Compute, Head, Progress, stream_layers
from .sources.architecture import Checkpoint

# The logits after every token of one sequence, in order, as float32 pieces (rows, vocabulary) of any number of rows.
LogitsOf = Callable[[Sequence[int]], Iterator[NDArray[np.float32]]]

_ROWS = 64  # positions compared at once: 64 x 128 000 in float64 is 66 MB

# Mean KL divergence (nats a token) above which an output is broken rather than coarse. Ten times and more what these
# types show on 7B models (Q4_K_M: 0.013), since small ones suffer more; a wrong layout or scale shows as several nats.
KL_BOUNDS = {
    **dict.fromkeys(("F32", "F16", "BF16"), 0.02),
    **dict.fromkeys(("Q8_0", "GPTQ-8"), 0.03),
    "Q6_K": 0.06,
    **dict.fromkeys(("Q5_K_M", "Q5_K_S"), 0.12),
    **dict.fromkeys(("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "GPTQ-4"), 0.4),
    **dict.fromkeys(("Q3_K_L", "Q3_K_M", "Q3_K_S", "GPTQ-3"), 1.2),
    **dict.fromkeys(("Q2_K", "GPTQ-2"), 3.0),
}


class VerificationError(KoalaError):
    """An output that does not behave like its source."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An output against its source over `tokens` predicted tokens. Divergence in nats a token, from source to output;
    `same_top` is the share of positions where both would pick the same token."""

    tokens: int
    source_perplexity: float
    perplexity: float
    kl_mean: float
    kl_99: float
    kl_max: float
    same_top: float


def streamed_logits(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    progress: Progress | None = None,
    *,
    compute: Compute | None = None,
    folder: Path | None = None,
) -> LogitsOf:
    """Runs a checkpoint over all `sequences` now, one layer at a time, and returns their logits by sequence, computed
    from the last hidden states when asked for. Raises ModelFileError."""
    batches = [torch.tensor([ids]) for ids in sequences]
    states = stream_layers(checkpoint, batches, None, progress, compute=compute, folder=folder)
    head = Head.read(checkpoint, compute)
    places = {tuple(ids): index for index, ids in enumerate(sequences)}

    def logits_of(ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        return (piece.numpy() for piece in head.logits(states[places[tuple(ids)]]))

    return logits_of


def compare(
    source: LogitsOf, output: LogitsOf, sequences: Sequence[Sequence[int]], progress: Progress | None = None
) -> Comparison:
    """Compares the predictions of every token but the first of each sequence.
    Raises VerificationError for logits that are not finite, or not one row a token, or of another vocabulary."""
    if not any(len(ids) > 1 for ids in sequences):
        raise VerificationError("the held text has less than two tokens", "give a longer text")
    parts = []
    for number, ids in enumerate(sequences, 1):
        parts.append(_compared(source, output, ids))
        if progress:
            progress(number, len(sequences))
    source_loss, loss, divergence, same = np.concatenate(parts, axis=1)
    with np.errstate(over="ignore"):
        return Comparison(
            tokens=len(loss),
            source_perplexity=float(np.exp(source_loss.mean())),
            perplexity=float(np.exp(loss.mean())),
            kl_mean=float(divergence.mean()),
            kl_99=float(np.quantile(divergence, 0.99)),
            kl_max=float(divergence.max()),
            same_top=float(same.mean()),
        )


def _compared(source: LogitsOf, output: LogitsOf, ids: Sequence[int]) -> NDArray[np.float64]:
    """(4, tokens - 1): loss of the source, loss of the output, divergence, whether the likeliest token is the same."""
    targets = torch.tensor(ids[1:])
    columns, at = [np.empty((4, 0))], 0
    blocks = zip_longest(_blocks(source(ids), "source", len(ids)), _blocks(output(ids), "output", len(ids)))
    for p_logits, q_logits in blocks:
        if p_logits.shape != q_logits.shape:
            raise VerificationError(
                f"the output predicts {q_logits.shape[1]} tokens and the source {p_logits.shape[1]}",
                "their vocabularies differ: compare the embedding's rows",
            )
        wanted = targets[at : at + len(p_logits)]
        at += len(p_logits)
        if len(wanted):  # the row after the last token predicts nothing that is known
            columns.append(_measured(p_logits[: len(wanted)], q_logits[: len(wanted)], wanted))
    return np.concatenate(columns, axis=1)


def _measured(p_logits: torch.Tensor, q_logits: torch.Tensor, wanted: torch.Tensor) -> NDArray[np.float64]:
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    losses = [-log.gather(1, wanted[:, None])[:, 0] for log in (p, q)]
    measured: NDArray[np.float64] = torch.stack([*losses, divergence, same]).numpy()
    return measured


def _blocks(pieces: Iterator[NDArray[np.float32]], whose: str, rows: int) -> Iterator[torch.Tensor]:
    """The same rows in blocks of `_ROWS`, the last one shorter; checked to be finite and `rows` in all."""
    held: list[torch.Tensor] = []
    seen = 0
    for piece in pieces:
        if not np.isfinite(piece).all():
            bad = seen + int((~np.isfinite(piece)).any(axis=1).argmax())
            count = int((~np.isfinite(piece)).sum())
            raise VerificationError(
                f"{count} logits of the {whose} after token {bad} or later are NaN or infinite", _BROKEN[whose]
            )
        seen += len(piece)
        held.append(torch.from_numpy(np.ascontiguousarray(piece)))
        if sum(map(len, held)) >= _ROWS:
            rows_held = torch.cat(held)
            whole = (len(rows_held) - 1) // _ROWS * _ROWS  # the last block waits: more may come to it
            yield from (rows_held[at : at + _ROWS] for at in range(0, whole, _ROWS))
            held = [rows_held[whole:]]
    if seen != rows:
        raise VerificationError(f"the {whose} gave {seen} rows of logits for {rows} tokens", _BROKEN[whose])
    yield torch.cat(held)


_BROKEN = {
    "source": "the checkpoint that was converted is broken itself: download it again",
    "output": "nothing was kept; quantize again to another type, and report this with the model's name",
}


def check(comparison: Comparison, kind: str) -> None:
    """Raises VerificationError, naming the figure, for an output whose divergence is that of a broken one of its type
    (`KL_BOUNDS`; the loosest bound for a type that is not there)."""
    bound = KL_BOUNDS.get(kind, max(KL_BOUNDS.values()))
    if not np.isfinite(comparison.perplexity):
        raise VerificationError(f"the perplexity of the output is {comparison.perplexity}", _BROKEN["output"])
    if not comparison.kl_mean <= bound:
        raise VerificationError(
            f"the output's KL divergence from its source is {comparison.kl_mean:.3g} nats a token; {kind} stays below "
            f"{bound:g} (perplexity {comparison.perplexity:.4g}, source {comparison.source_perplexity:.4g})",
            _BROKEN["output"],
        )
