"""`koala finetune`: a checkpoint or a shape, dialogues and settings in, a trained checkpoint out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koala_local import console
from koala_local.extras import need

if TYPE_CHECKING:
    from .plan import Plan
    from .settings import Settings

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Train a model on dialogues.")
@click.option("--base", type=_FOLDER, help="The checkpoint to start from; none: from scratch, with model.* keys.")
@click.option("--data", required=True, metavar="CORPUS|RECIPE|FILE", help="A built corpus, a recipe, or dialogues.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--gpus", type=click.IntRange(0, 1024), help="Of each machine; 0: the processor. Default: all there are.")
@click.option("--nodes", type=click.IntRange(1, 65_536), default=1, help="Machines; each runs this command.")
@click.option("--rendezvous", default="", metavar="HOST:PORT", help="Where nodes meet: one of them.")
@click.option("--lora", is_flag=True, help="Train low-rank adapters; they are merged into the base at the end.")
@click.option("--qlora", is_flag=True, help="The same over a base of 4 bits.")
@click.option("--plan", "plan_only", is_flag=True, help="Say what it takes and whether it fits, and stop.")
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings as TOML.")
@click.option("--raw", type=_FOLDER, help="Folder of the raw files of a recipe; default: download them.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="Where the base has none.")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]..")
def finetune(data: str, out: Path, words: tuple[str, ...], **options: Any) -> int:
    """Train a model on dialogues and write it as a Hugging Face checkpoint.

    KEY=VALUE sets one of: epochs, max_steps, sequence_length, global_batch, micro_batch, learning_rate, .. and, for a
    model from scratch, model.hidden_size, model.layers, ..; an unknown key lists all.
    """
    need("finetune", "torch", "transformers", "safetensors", "sentencepiece", "tensorboard", "matplotlib")

    if options["rendezvous"] and options["nodes"] == 1:
        raise click.UsageError("--rendezvous is for --nodes of 2 or more")
    return _finetune(data, out, words, options)


def _finetune(data: str, out: Path, words: tuple[str, ...], options: dict[str, Any]) -> int:
    from .data.views import telling
    from .job import Job
    from .launch import Place, check_place, gpus_here, launch
    from .prepare import check_output, is_corpus, is_finished, locked, prepare, recipe_settings

    settings = _settings(words, options)
    base, vocabulary = options["base"], _tokenizer(options["base"], options["tokenizer"], settings)
    place = Place(gpus_here() if options["gpus"] is None else options["gpus"], options["nodes"], options["rendezvous"])
    if not options["plan_only"]:
        check_place(place)
        check_output(out, resume=options["resume"])
        if options["resume"] and is_finished(out):
            return _end(console.Exit.OK, out, f"the run in {out} is finished: --base {out} trains its model further")
    from .forecast import forecast, read_tokenizer  # transformers is slow to import: not before what fails at once

    tokenizer = read_tokenizer(base, vocabulary, settings)
    nothing_to_make = options["plan_only"] and is_corpus(data)
    early = console.told_when_stopped("stopped before the first step: the same command starts again")
    with early, nullcontext() if nothing_to_make else locked(out), telling() as tell:
        corpus = prepare(data, out, tokenizer, options["raw"], tell)
    settings = _settings(words, options, recipe_settings(corpus))
    job = Job(settings, base, tokenizer, corpus, out, place.gpus, options["resume"])
    plan = forecast(job, place)
    _show(plan, plan_only=options["plan_only"])
    if options["plan_only"]:
        return console.Exit.OK
    return _end(launch("koala_local.finetune.worker:work", (replace(job, price=plan.dollars_an_hour),), place), out)


def _show(plan: Plan, *, plan_only: bool) -> None:
    """Print the plan; once, where several processes make it. Raises OutOfMemoryError when the run does not fit."""
    from .launch import current_rank

    if plan_only:
        console.out(str(plan))
    elif current_rank().first:
        console.note(str(plan))
    plan.check()


def _end(status: int, out: Path, note: str = "") -> int:
    """Say what there is now, once, where several processes end; return the status."""
    from .launch import current_rank

    if current_rank().first:
        if note:
            console.note(note)
        if status:
            console.note(f"stopped; what was done is saved in {out}: the same command with --resume goes on")
        else:
            console.out(str(out))
    return status


def _settings(words: tuple[str, ...], options: dict[str, Any], defaults: dict[str, Any] | None = None) -> Settings:
    from .settings import read_settings

    lora = options["lora"] or options["qlora"]
    return read_settings(options["config"], words, lora=lora, four_bit=options["qlora"], defaults=defaults or {})


def _tokenizer(base: Path | None, given: Path | None, settings: Settings) -> Path:
    """Where the tokenizer is. Raises UsageError when that is not said, or what the model is."""
    if base is None and settings.model is None:
        raise click.UsageError("name a checkpoint with --base, or a shape with model.* keys")
    if base is not None and settings.model is not None:
        raise click.UsageError("--base and model.* keys exclude each other")
    place = given or base
    if place is None:
        raise click.UsageError("a model from scratch needs --tokenizer: a file, or the folder of a checkpoint")
    return place
