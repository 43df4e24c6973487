"""`koala data`: build a corpus from raw dialogues and texts, look into it, and report on it; make a tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from koala_local import console
from koala_local.extras import need

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEEDED = ("numpy", "sentencepiece", "datasketch", "py3langid", "matplotlib", "pyarrow")
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(short_help="Build a training corpus from raw dialogues, and look into it.")
def data() -> None:
    """Make dialogues and plain texts into tokens that `koala finetune` trains on."""


@data.command(short_help="Make a corpus of a recipe, or of a file of your own.")
@click.argument("recipe")
@click.option("--raw", type=_FOLDER, help="Folder of the raw files, as published; default: download them.")
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A tokenizer.model, or the folder of a checkpoint.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--test-set", "test_sets", multiple=True, type=_FILE, help="Leave out what is too close to its queries.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes; default: one for each core.")
@click.option("--force", is_flag=True, help="Replace an existing corpus.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def build(
    recipe: str,
    raw: Path | None,
    tokenizer: Path,
    output: Path,
    test_sets: tuple[Path, ...],
    workers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a corpus of RECIPE: koala-all, koala-distill, open-source, a .toml file, or a file of rows of your own.

    Your own rows are {"messages"}, {"conversations"}, {"instruction", "output"}, {"chosen", "rejected"}, or {"text"},
    which is learned whole.

    A build that was stopped goes on behind the sources that are done when it is run again.
    """
    need("finetune", *_NEEDED)
    from .build import build as make
    from .build import choose_recipe
    from .tokens import DialogueTokenizer
    from .views import telling

    stopped = "stopped; the same command goes on behind the sources that are done"
    with console.told_when_stopped(stopped), telling() as tell:
        report = make(
            choose_recipe(recipe),
            output,
            DialogueTokenizer(tokenizer),
            raw=raw,
            test_sets=test_sets,
            processes=workers,
            force=force,
            tell=tell,
        )
    if as_json:
        console.json_line(report)
        return
    _show_report(report)
    console.note(f"{output}: {report['total']['kept']:,} examples, {report['total']['tokens']:,} tokens")


@data.command(short_help="Make a tokenizer of your own rows, for a model from scratch.")
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("--size", required=True, type=click.IntRange(1, 262_144), help="Pieces: the size of the vocabulary.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make.")
def tokenizer(files: tuple[Path, ...], size: int, output: Path) -> None:
    """Make a tokenizer of LLaMA's kind of FILES, which hold dialogues or texts as `koala data build` takes them."""
    need("finetune", *_NEEDED)
    from .new_tokenizer import train_tokenizer

    lines = train_tokenizer(files, size, output)
    console.note(f"{output}: {size:,} pieces, made of {lines:,} lines")


@data.command(short_help="Show an example of a corpus, with what is trained on.")
@click.argument("corpus", type=_FOLDER)
@click.option("--source", help="Of this source only.")
@click.option("--index", type=click.IntRange(0), help="The example of this number, from 0.")
@click.option("--random", "at_random", is_flag=True, help="Any one.")
def inspect(corpus: Path, source: str | None, index: int | None, at_random: bool) -> None:
    """Show an example of CORPUS as the model reads it: tokens that are trained on are green, or in ⟦brackets⟧."""
    need("finetune", *_NEEDED)
    if index is not None and at_random:
        raise click.UsageError("--index and --random exclude each other")
    from .look import look
    from .views import dialogue_view

    found = look(corpus, source, None if at_random else index or 0)
    console.note(
        f"{found.source}, {found.row}; example {found.index} of the corpus; {found.tokens:,} tokens, "
        f"{found.trained:,} trained on{', held out' if found.held_out else ''}"
    )
    coloured = sys.stdout.isatty() and not console.out_console().no_color
    view = dialogue_view(found.runs, coloured=coloured)
    if coloured:
        console.out_console().print(view, soft_wrap=True)
    else:
        console.out(view.plain)


@data.command(short_help="Tell what a corpus is made of.")
@click.argument("corpus", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option("--no-plots", is_flag=True, help="Write no pictures into the corpus's folder.")
def report(corpus: Path, as_json: bool, no_plots: bool) -> None:
    """Tell what CORPUS is made of: counts beside the published ones, lengths, and what was left out and why."""
    need("finetune", *_NEEDED)
    from .look import read_report

    found = read_report(corpus)
    if as_json:
        console.json_line(found)
    else:
        _show_report(found)
    if not no_plots:
        from .report import write_plots

        console.note(f"pictures: {', '.join(str(path) for path in write_plots(found, corpus))}")


def _show_report(found: object) -> None:
    from .views import report_view

    view = report_view(found)  # type: ignore[arg-type]
    if sys.stdout.isatty():
        console.out_console().print(view)
    else:
        console.out(console.as_text(view))
