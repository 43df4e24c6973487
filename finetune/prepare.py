"""Before any rank is started: the output folder is this run's, and the data lies there as a corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from koala_local.disk import lock
from koala_local.errors import KoalaError

from .data.build import build, choose_recipe, file_hash
from .data.corpus import MANIFEST, Manifest, read_manifest
from .data.mix import Tell
from .data.recipe import Recipe
from .data.tokens import DialogueTokenizer
from .run_log import LOG

CORPUS = "corpus"


def check_output(out: Path, *, resume: bool) -> None:
    """Raise KoalaError unless a run can begin, or with `resume` go on, in the folder."""
    if out.exists() and not out.is_dir():
        raise KoalaError(f"{str(out)!r} is a file", "give another name with -o")
    if resume and (out / "config.json").exists() and not is_finished(out):
        raise KoalaError(f"{str(out)!r} holds a checkpoint and no run", "name the folder of a run with -o")
    if not resume and has_begun(out):
        raise KoalaError(f"{str(out)!r} exists already", "give another name with -o, or go on with it: --resume")


def has_begun(out: Path) -> bool:
    """Whether the folder holds more than what lies there before the first step."""
    return out.is_dir() and any(path.name != CORPUS and not path.name.startswith(".") for path in out.iterdir())


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder, made if need be, for one process at a time: the first one prepares the data, the others find it.
    Raises KoalaError when it cannot be written."""
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(out / ".lock", math.inf, removed=True))
        except OSError as error:
            what = f"{str(out)!r} cannot be written: {error.strerror}"
            raise KoalaError(what, "give another folder with -o") from None
        yield


@contextmanager
def training(out: Path) -> Iterator[None]:
    """The folder for one run at a time: what its first rank holds while it trains. Raises KoalaError where another
    run goes on in it, or came to its end meanwhile."""
    with lock(out / ".running", removed=True) as alone:
        if not alone:
            raise KoalaError(f"another process is training in {str(out)!r}", "wait until it ends, or stop it first")
        if is_finished(out):
            raise KoalaError(f"the run in {str(out)!r} is finished", "train its checkpoint further with --base")
        yield


def is_finished(out: Path) -> bool:
    """Whether the folder holds a run and the model that it ended with."""
    return all((out / name).exists() for name in (LOG, "config.json"))


def is_corpus(data: str) -> bool:
    """Whether it is the folder of a corpus, and not what one is built of."""
    return (Path(data) / MANIFEST).is_file()


def prepare(data: str, out: Path, tokenizer: DialogueTokenizer, raw: Path | None, tell: Tell) -> Path:
    """The folder of the corpus: `data` itself, or one made of it in `out`. Raises KoalaError, also when the one that a
    begun run has was made of something else."""
    if is_corpus(data):
        return Path(data)
    recipe = choose_recipe(data)
    made = out / CORPUS
    if made.exists():
        changed = _change(read_manifest(made), recipe)
        if not changed:
            return made
        if has_begun(out):
            hint = "resume with what it was started with, or start a new run with another -o"
            raise KoalaError(f"{changed} since the run in {str(out)!r} began", hint)
    build(recipe, made, tokenizer, raw=raw, force=made.exists(), tell=tell)
    return made


def recipe_settings(corpus: Path) -> dict[str, Any]:
    """The settings that a corpus's recipe proposes: its epochs, and the weights of its sources."""
    recipe = read_manifest(corpus).recipe
    sources = recipe.get("sources")
    rules = sources.items() if isinstance(sources, dict) else ()
    weights = {key: each["weight"] for key, each in rules if isinstance(each, dict) and each.get("weight", 1.0) != 1.0}
    return {"weights": weights, **({"epochs": recipe["epochs"]} if "epochs" in recipe else {})}


def _change(manifest: Manifest, recipe: Recipe) -> str:
    """What of the recipe, or of a user's own files in it, is not as in the manifest; empty: nothing."""
    now = json.loads(json.dumps(recipe.as_tree()))
    for key in sorted({*now, *manifest.recipe}):
        if now.get(key) != manifest.recipe.get(key):
            return f"the recipe's {key} changed"
    for key, rules in recipe.sources.items():
        for path in rules.files:
            if manifest.inputs.get(f"{key}/{path.name}") != file_hash(path):
                return f"{str(path)!r} changed"
    return ""
