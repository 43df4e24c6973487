"""`koala pull`, `koala list` and `koala rm`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from koala_local import console
from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.page import columns
from koala_local.wording import size

if TYPE_CHECKING:
    from koala_local.models.pull import Offer
    from koala_local.models.reference import HubReference
    from koala_local.models.store import Details, Known

_FITS = {True: "yes", False: "no", None: "?"}


@click.command(short_help="Download a model, or register one of your own.")
@click.argument("reference", metavar="REF")
@click.option("--list", "only_list", is_flag=True, help="Only show which types there are.")
def pull(reference: str, only_list: bool) -> None:
    """Get the model REF: an alias such as koala-13b, or OWNER/REPO[:TYPE or :FILE][@REVISION] on the Hugging Face hub.

    Without a type the best one that fits this machine is taken. A path registers a model of your own instead.
    """
    from koala_local.models import resolve, store

    path, wanted = resolve.expanded(reference), resolve.hub_reference(reference)
    found: Path | None = path
    if resolve.has_model(path):
        if only_list:
            raise click.UsageError(f"--list asks the hub, and {reference} is a path: `koala show` tells what it is")
        for model in store.register(path):
            console.note(f"registered {model.reference}; {_next_step(model.runs, model.reference, model.path)}")
    elif wanted is not None:
        found = fetch(reference, wanted, only_list=only_list)
    elif ":" in reference or "@" in reference:
        hint = "a name is OWNER/REPO[:TYPE or :FILE][@REVISION]"
        raise ModelFileError(f"{reference!r} names no model on the hub", hint)
    else:
        found = resolve.resolve(reference, None)  # a registered one, or an error that says what is nearest
    if found:
        console.out(str(found))


def _next_step(runs: bool, reference: str, path: Path) -> str:
    """What to do with a model that is here now."""
    if runs:
        return f"to talk to it: koala chat {shlex.quote(reference)}"
    return f"an unquantized checkpoint: koala quantize {shlex.quote(str(path))} --bits 4 makes a model to chat with"


def fetch(text: str, wanted: HubReference, *, only_list: bool = False, to_run: bool = False) -> Path | None:
    """Download the model that the user calls `text`, saying what and how much; `to_run`: unless chat cannot run it.
    Raises KoalaError.

    Where the hub cannot be reached, what is in the cache is good enough."""
    from koala_local.models import cache
    from koala_local.models.devices import this_machine
    from koala_local.models.hub import UnreachableError
    from koala_local.models.memory import fits_on
    from koala_local.models.pull import bring, look
    from koala_local.models.variants import UNQUANTIZED

    fits = fits_on(this_machine())
    try:
        offer = look(wanted, fits)
    except UnreachableError as error:
        found = None if only_list else cache.find(wanted)
        if found is None:
            raise
        console.warn(f"{error.message}; {text} is in the cache already")
        return found
    chosen = offer.chosen
    unquantized = chosen.type in UNQUANTIZED
    if only_list or wanted.choice is None:
        answers = ["-" if unquantized else _FITS[fits(variant.size)] for variant in offer.found]
        console.note(_table(offer, answers))
    if only_list:
        return None
    if unquantized and to_run:
        what = f"{text} is an unquantized checkpoint of {size(chosen.size)}; chat runs GGUF and GPTQ models"
        raise ModelFileError(what, f"koala pull {text} downloads it, for koala quantize")
    if not unquantized and fits(chosen.size) is False:
        console.warn(f"{chosen.choice} takes {size(chosen.size)}, more than fits this machine well")
    console.note(_announcement(offer))
    with (
        console.told_when_stopped("stopped; the same command goes on with what is there"),
        console.progress("downloading", "B") as step,
    ):
        path = bring(offer, step)
    if not to_run:
        console.note(_next_step(not unquantized, text, path))
    return path


def _table(offer: Offer, fits: Sequence[str]) -> str:
    rows = [["", "TYPE", "SIZE", "FITS", "FILE"]]
    for variant, answer in zip(offer.found, fits, strict=True):
        parts = f" and {len(variant.files) - 1} more" if len(variant.files) > 1 else ""
        mark = "->" if variant == offer.chosen else ""
        file = variant.name or max(variant.files, key=lambda file: file.size).name
        rows.append([mark, variant.type or "?", size(variant.size), answer, f"{file}{parts}"])
    return columns(rows, stream=sys.stderr)


def _announcement(offer: Offer) -> str:
    what = f"{offer.repository.name}:{offer.chosen.choice} at {offer.repository.commit[:12]}"
    missing, whole = offer.missing, offer.chosen.size
    if not missing:
        return f"{what}, {size(whole)}: all of it is here"
    rest = f", of which {size(missing)} are missing" if missing < whole else ""
    return f"downloading {what}, {size(whole)}{rest}"


@click.command("list", short_help="List the models that are here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_models(as_json: bool) -> None:
    """The models that are here: the bundled one, registered ones, and those in the Hugging Face cache.

    The first column is what the other commands take.
    """
    from koala_local.models import store

    rows = [["MODEL", "SIZE", "TYPE", "CONTEXT", "LAST USED"]]
    for model in store.known():
        about = store.details(model) if model.size is not None else store.Details("", None, "it is gone")
        if as_json:
            console.json_line(_as_json(model, about))
            continue
        takes = size(model.size) if model.size is not None else "gone"
        context = str(about.context or "?") if not about.problem or model.size is None else "damaged"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.used)) if model.used else "-"
        rows.append([model.reference, takes, about.type or "?", context, used])
    if not as_json:
        console.out(columns(rows))


def _as_json(model: Known, about: Details) -> dict[str, object]:
    return {
        "model": model.reference,
        "path": str(model.path),
        "origin": model.origin,
        "repository": model.repository,
        "size": model.size,
        "runs": model.runs,
        "type": about.type,
        "context": about.context,
        "last_used": model.used,
        "problem": about.problem or None,
    }


@click.command("rm", short_help="Remove a model from the cache, or forget one of your own.")
@click.argument("reference", metavar="REF")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def remove(reference: str, yes: bool) -> None:
    """Remove the model REF from the Hugging Face cache, which other programs use too.

    OWNER/REPO without a type means all of its types. A registered file or folder is only forgotten; it stays.
    """
    from koala_local.models import resolve, store

    if reference == store.BUNDLED:
        raise KoalaError("the bundled model belongs to the program", "uninstall koala to remove it")
    registered = _registered(reference)
    if registered is not None:
        store.unregister(registered)
        console.note(f"forgot {registered}; the files stay where they are")
        return
    wanted = resolve.hub_reference(reference)
    if wanted is None:
        raise ModelFileError(f"{reference!r} is neither registered nor in the cache", "`koala list` shows what is")
    _remove_cached(reference, wanted, yes)


def _registered(reference: str) -> Path | None:
    """The registered file or folder that is meant, by its path or its name."""
    from koala_local.models import resolve, store

    paths = store.registered_paths()
    path = resolve.expanded(reference)
    if path in paths:
        return path
    inside = path.parent in paths and path.is_file()
    if not inside and resolve.hub_reference(reference) is not None:  # as everywhere: an alias means the hub's model
        return None
    named = [] if inside else [each for each in paths if reference.lower() in (each.name.lower(), each.stem.lower())]
    if len(named) > 1:
        what = f"{reference!r} names {len(named)} registered models or folders"
        raise ModelFileError(what, f"give the path of one: {', '.join(repr(str(each)) for each in named)}")
    if named:
        return named[0]
    found = path if inside else store.find_registered(reference)
    if found is None:
        return None
    what = f"{reference!r} is registered with its folder, {str(found.parent)!r}"
    raise ModelFileError(what, f"koala rm {shlex.quote(str(found.parent))} forgets all that is in it")


def _remove_cached(text: str, wanted: HubReference, yes: bool) -> None:
    from koala_local.models import pull as cached
    from koala_local.models import store

    files = cached.cached_files(wanted)
    if not files and not cached.half_finished(wanted):
        raise ModelFileError(f"{text} is not in the cache", "`koala list` shows what is")
    mine = [model for model in store.known() if model.repository == wanted.repository]
    gone = [model for model in mine if _holds(model.path.parent.resolve() / model.path.name, files)]
    what = ", ".join(f"{model.reference} ({size(model.size or 0)})" for model in gone) or f"what is left of {text}"
    if not yes:
        if not (sys.stdin and sys.stdin.isatty()):
            raise KoalaError(f"{what} would be removed", f"koala rm {text} --yes does it without asking")
        if not click.confirm(f"Remove {what}?", err=True):
            console.note("nothing is removed")
            return
    freed = cached.remove(wanted)
    for model in gone:
        if not model.path.exists():
            store.forget(model.path)
    console.note(f"removed {what}; {size(freed)} are free again")


def _holds(model: Path, files: Iterable[Path]) -> bool:
    """Whether one of the files is the model, or lies in its folder."""
    return any(path.is_relative_to(model) for path in files)
