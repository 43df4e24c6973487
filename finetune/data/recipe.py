"""Recipes: which sources a mix has, how often each is seen, and how it is cleaned. TOML files, some of them built in.

description = "what it is"
seed = 42                # of everything that is drawn while reading
epochs = 2               # that a training run takes, unless it is told otherwise

[sources.sharegpt]       # a known source, or a name of your own where `files` are given
files = ["mine.jsonl"]   # your own dialogues, pairs or plain texts, beside the recipe
weight = 1.0             # times per epoch
english = true           # leave out what is in another language
duplicates = "near"      # "keep", "exact" or "near": of queries that were asked before, leave out these
keywords = ["openai"]    # leave out a dialogue in which anyone says one of these, be it dropped
decontaminate = true     # leave out what is too close to a query of a test set

A plain text has no query: it is never too close to a test set's, and a duplicate only where it repeats another whole.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from koala_local.errors import KoalaError

from .duplicates import Strictness

_SUFFIX = ".toml"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_LARGEST_WEIGHT = 1e6


class RecipeError(KoalaError):
    """A recipe that there is not, or that says what no recipe can."""


@dataclass(frozen=True, slots=True)
class SourceRules:
    """What is done with the examples of one source."""

    weight: float = 1.0  # times per epoch
    english: bool = False
    duplicates: Strictness = "keep"
    keywords: tuple[str, ...] = ()  # in lower case
    decontaminate: bool = True
    files: tuple[Path, ...] = ()  # of a user's own source


@dataclass(frozen=True, slots=True)
class Recipe:
    """A mix. The order of its sources decides which of two duplicates stays, and the order of the corpus."""

    name: str
    sources: Mapping[str, SourceRules]
    description: str = ""
    seed: int = 42
    epochs: float = 2.0

    def as_tree(self) -> dict[str, Any]:
        """Plain values; a user's files by their names alone."""
        tree = asdict(self)
        for rules in tree["sources"].values():
            rules["files"] = [path.name for path in rules["files"]]
        return tree


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(each.name.removesuffix(_SUFFIX) for each in _folder().iterdir() if each.name.endswith(_SUFFIX))


def read_recipe(what: str, known: Sequence[str]) -> Recipe:
    """The built-in recipe called `what`, or that of the TOML file at that path. `known` are the keys of the sources
    that need no files. Raises RecipeError."""
    if what in recipe_names():
        return parse_recipe((_folder() / f"{what}{_SUFFIX}").read_text("utf-8"), what, known, Path())
    path = Path(what)
    if path.suffix != _SUFFIX or not path.is_file():
        hint = f"the recipes are {', '.join(recipe_names())}; or name a .toml file, or a file of dialogues"
        raise RecipeError(f"there is no recipe {what!r}", hint)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{what!r} cannot be read: {error.strerror}", "check the path") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{what!r} is not UTF-8 text", "save it as UTF-8") from None
    return parse_recipe(text, path.stem, known, path.parent)


def own_recipe(paths: Sequence[Path]) -> Recipe:
    """The recipe of a user's own files: everything is kept but what is in a test set."""
    return Recipe("own", {"own": SourceRules(files=tuple(paths))}, "a file of one's own", epochs=2.0)


def parse_recipe(text: str, name: str, known: Sequence[str], folder: Path) -> Recipe:
    """The recipe that the TOML text describes; its files are looked for in `folder`. Raises RecipeError."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of endless numbers
        raise RecipeError(f"the recipe {name!r} is not valid TOML: {error}", "its lines are KEY = VALUE") from None
    _check_keys(tree, ("description", "seed", "epochs", "sources"), f"the recipe {name!r}")
    sources = tree.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise RecipeError(f"the recipe {name!r} has no sources", f"add [sources.NAME], of {', '.join(known)}")
    rules = {key: _parse_rules(key, value, known, folder) for key, value in sources.items()}
    return Recipe(
        name,
        rules,
        _get(tree, "description", "", _is_text, "text"),
        _get(tree, "seed", 42, _is_seed, "a whole number from 0 to 2^63 - 1"),
        float(_get(tree, "epochs", 2.0, _is_weight, "a number above 0")),
    )


def _parse_rules(key: str, tree: Any, known: Sequence[str], folder: Path) -> SourceRules:
    where = f"sources.{key}"
    if not isinstance(tree, dict):
        raise RecipeError(f"{where} is {str(tree)[:80]!r}, not a table", f"write [{where}]")
    _check_keys(tree, tuple(SourceRules.__dataclass_fields__), where)
    own = _get(tree, "files", [], _is_texts, "a list of file names", where)
    if not own and key not in known:
        _unknown(key, known, "source", "the sources are", "or give it files = [..] of your own")
    if own and (key in known or not _NAME.fullmatch(key)):
        what = "the name of a known source" if key in known else "no name"
        raise RecipeError(f"{where} has files, but {key!r} is {what}", "name it in lower case, such as [sources.mine]")
    return SourceRules(
        float(_get(tree, "weight", 1.0, _is_weight, "a number above 0", where)),
        _get(tree, "english", False, _is_bool, "true or false", where),
        _get(tree, "duplicates", "keep", _is_strictness, 'one of "keep", "exact", "near"', where),
        tuple(word.lower() for word in _get(tree, "keywords", [], _is_texts, "a list of words", where)),
        _get(tree, "decontaminate", True, _is_bool, "true or false", where),
        tuple(folder / Path(name).expanduser() for name in own),
    )


def _get(
    tree: Mapping[str, Any], key: str, default: Any, fits: Callable[[Any], bool], kind: str, where: str = ""
) -> Any:
    value = tree.get(key, default)
    if not fits(value):
        name = f"{where}.{key}" if where else key
        raise RecipeError(f"{name} is {str(value)[:80]!r}, not {kind}", f"set it to {kind}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_strictness(value: Any) -> bool:
    return value in ("keep", "exact", "near")


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 < value <= _LARGEST_WEIGHT


def _check_keys(tree: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in tree:
        if key not in allowed:
            _unknown(key, allowed, "key", f"{where} may have")


def _unknown(name: str, allowed: Sequence[str], kind: str, what: str, besides: str = "") -> NoReturn:
    near = get_close_matches(name, allowed, n=1)
    hint = (f"did you mean {near[0]}? " if near else "") + f"{what} {', '.join(allowed)}"
    raise RecipeError(f"there is no {kind} {name!r}", f"{hint}; {besides}" if besides else hint)


def _folder() -> Any:
    return files(__package__) / "recipes"
