"""What is told of an output: its report and its card beside it, and the outcome on the screen."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from koala_local import console
from koala_local.disk import replacing
from koala_local.wording import size

if TYPE_CHECKING:
    from .report import Report


def report_files(out: Path, *, folder: bool) -> tuple[Path, Path]:
    """Where the report and the model card of an output lie: inside a folder, or beside a file."""
    if folder:
        return out / "quantization.json", out / "README.md"
    stem = out.with_suffix("").name
    return out.with_name(f"{stem}.json"), out.with_name(f"{stem}.md")


def save_report(report: Report, files: tuple[Path, Path]) -> None:
    """Write the report and the card: both, or none. Raises OSError."""
    with ExitStack() as stack:
        for path, text in zip(files, (report.to_json(), report.model_card()), strict=True):
            stack.enter_context(replacing(path)).write_bytes(text.encode())


def tell_outcome(report: Report, out: Path, files: tuple[Path, Path], *, as_json: bool) -> None:
    """Say on the screen what was written."""
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
    console.note(f"report and model card: {', '.join(map(str, files))}")
