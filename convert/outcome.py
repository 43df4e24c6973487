"""What is told of a finished output: its report and its card beside it, and the outcome on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from koala_local import console
from koala_local.disk import write_whole
from koala_local.wording import size

if TYPE_CHECKING:
    from .report import Report


def tell_outcome(report: Report, out: Path, *, as_json: bool) -> None:
    """Write the report beside a file, or inside a folder, as JSON and as a model card; say it on the screen."""
    stem = out / "quantization" if out.is_dir() else out.with_suffix("")
    card = out / "README" if out.is_dir() else stem
    texts = {
        stem.with_name(f"{stem.name}.json"): report.to_json(),
        card.with_name(f"{card.name}.md"): report.model_card(),
    }
    for path, text in texts.items():
        write_whole(path, [text.encode()])
    if as_json:
        console.out(report.to_json().rstrip("\n"))
        return
    console.out(f"{out}  {report.kind}, {size(report.size)}, {report.bits_per_weight:.2f} bits a weight")
    if (c := report.comparison) is not None:
        console.out(
            f"perplexity {c.perplexity:.4f}, source {c.source_perplexity:.4f}; KL divergence {c.kl_mean:.5f}; "
            f"same likeliest token {c.same_top:.1%} ({c.tokens:,} predictions)"
        )
    for fit in report.fits:
        cards = ", ".join(f"{card}" for card in fit.cards)
        console.out(
            f"{fit.total:.1f} GiB with {fit.context} tokens of {fit.kv_type} KV cache: "
            + (f"fits cards of {cards} GB" if cards else "fits no card up to 24 GB")
        )
    console.note(f"report and model card: {', '.join(str(path) for path in texts)}")
