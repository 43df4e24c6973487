"""The build: the raw files of a recipe -> a folder with the mix, its tokens, and a report.

Everything is made in a folder beside the final one, which gets its name when it is whole. A build that was stopped,
however hard, goes on with the stages that it left there.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

from koala_local import console
from koala_local.disk import FULL, lock, remove_leftovers
from koala_local.errors import KoalaError
from koala_local.wording import size

from .contamination import TestQuery, find_sets, read_set
from .corpus import Corpus, open_corpus
from .corpus_writer import write_corpus
from .download import fetch, find_raw, missing_files
from .examples import read_examples, write_tree
from .mix import Stage, Tally, Tell, make_stage, stage_name, write_mix
from .recipe import Recipe, SourceRules, own_recipe, read_recipe
from .report import source_report, whole_report
from .sources import OWN, SOURCES, Source, read_source
from .sources.reading import label
from .tokens import DialogueTokenizer
from .workers import Workers, usable_cores, workers

MIX, REPORT, TOKENIZER = "dialogues.jsonl", "report.json", "tokenizer"
_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "config.json",  # some name their BOS and EOS only there
)
_PACKED = {".gz": 4, ".xz": 6, ".parquet": 3, ".zst": 5}  # how much larger the text of a compressed file is, about
_DISK = 4  # bytes on disk for a byte of raw text: stage, mix, tokens and room to move


class BuildError(KoalaError):
    """A corpus that cannot be built here."""


@dataclass(frozen=True, slots=True)
class _File:
    """A raw file; `name` is what its rows are named after."""

    path: Path
    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _TestSet:
    file: str
    sha256: str
    queries: tuple[TestQuery, ...]


def choose_recipe(what: str) -> Recipe:
    """The recipe of that name or TOML file, or that of a file of one's own rows. Raises RecipeError."""
    path = Path(what)
    if path.is_file() and path.suffix != ".toml":
        return own_recipe([path])
    return read_recipe(what, tuple(key for key in SOURCES))


def build(
    recipe: Recipe,
    out: Path,
    tokenizer: DialogueTokenizer,
    *,
    raw: Path | None = None,
    test_sets: Sequence[Path] = (),
    processes: int | None = None,
    force: bool = False,
    tell: Tell = lambda *_: None,
) -> dict[str, Any]:
    """Make the corpus of the recipe in the folder `out` and return its report. `raw`: where the raw files are; None
    downloads them.
    Raises BuildError, and what reading the raw files and the test sets raises."""
    _refuse_existing(out, force)
    tests = _read_tests(sorted({*test_sets, *(find_sets(raw) if raw else ())}))
    sources = {key: _source(key, rules) for key, rules in recipe.sources.items()}
    with _unfinished(out) as folder, workers(processes or usable_cores()) as work:
        _refuse_existing(out, force)  # another build may have made it meanwhile
        inputs = {key: _find(sources[key], rules, raw, tell) for key, rules in recipe.sources.items()}
        _warn_of_missing(sources, inputs)
        _check_space(out, [file.path for files in inputs.values() for file in files])
        stages = [
            _stage(sources[key], rules, inputs[key], recipe.seed, tests, folder / "stages", work, tell)
            for key, rules in recipe.sources.items()
        ]
        made = folder / "corpus"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        tallies = write_mix(stages, made / MIX, work, tell)
        kept = sum(tally.kept for tally in tallies.values())
        if not kept:
            shutil.rmtree(folder / "stages")  # they lead nowhere
            raise BuildError("nothing is left of the raw data", _why_nothing(tallies))
        write_corpus(
            read_examples(made / MIX),
            tokenizer,
            made,
            inputs={f"{key}/{file.name}": file.sha256 for key, files in inputs.items() for file in files},
            recipe=recipe.as_tree(),
            work=work,
            progress=lambda documents: tell("tokens of dialogues", documents, kept),
        )
        report = _report(recipe, sources, inputs, tests, tallies, open_corpus(made), tokenizer.path)
        _copy_tokenizer(tokenizer.path, made / TOKENIZER)
        write_tree(made / REPORT, report)
        _publish(made, out)
    return report


def _copy_tokenizer(path: Path, folder: Path) -> None:
    """With it a corpus can be read as text, wherever its tokenizer goes."""
    folder.mkdir()
    files = [path / name for name in _TOKENIZER_FILES if (path / name).is_file()] if path.is_dir() else [path]
    for file in files:
        name = file.name if path.is_dir() else f"tokenizer{path.suffix}"
        shutil.copyfile(file, folder / name)


def _why_nothing(tallies: Mapping[str, Tally]) -> str:
    reasons: Counter[str] = Counter()
    for tally in tallies.values():
        reasons.update(tally.skipped)
        reasons.update(tally.removed)
    return "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(3) if count)


def _report(
    recipe: Recipe,
    sources: Mapping[str, Source],
    inputs: Mapping[str, Sequence[_File]],
    tests: Sequence[_TestSet],
    tallies: Mapping[str, Tally],
    corpus: Corpus,
    tokenizer: Path,
) -> dict[str, Any]:
    lengths, trained = corpus.lengths, corpus.trained_counts
    each = {}
    for key, source in sources.items():
        mine = corpus.sources == corpus.source_names.index(key) if key in corpus.source_names else slice(0, 0)
        files = [{"file": file.name, "sha256": file.sha256} for file in inputs[key]]
        missing = _missing(source, inputs[key])
        each[key] = source_report(source, tallies[key], lengths[mine], int(trained[mine].sum()), files, missing)
    sets = [{"file": each.file, "sha256": each.sha256, "queries": len(each.queries)} for each in tests]
    return whole_report(recipe, each, sets, lengths, tokenizer.name)


def _warn_of_missing(sources: Mapping[str, Source], inputs: Mapping[str, Sequence[_File]]) -> None:
    for key, source in sources.items():
        if names := ", ".join(_missing(source, inputs[key])):
            console.warn(f"{source.title} is read without these of its published files: {names}")


def _missing(source: Source, files: Sequence[_File]) -> list[str]:
    return missing_files(source, [file.path for file in files])


def _source(key: str, rules: SourceRules) -> Source:
    if not rules.files:
        return SOURCES[key]
    return OWN if key == OWN.key else replace(OWN, key=key, title=key)


def _find(source: Source, rules: SourceRules, raw: Path | None, tell: Tell) -> list[_File]:
    paths = list(rules.files) if rules.files else find_raw(source, raw) if raw else fetch(source, progress=tell)
    return [_File(path, label(source, path), file_hash(path)) for path in paths]


def _stage(
    source: Source,
    rules: SourceRules,
    files: Sequence[_File],
    seed: int,
    tests: Sequence[_TestSet],
    folder: Path,
    work: Workers,
    tell: Tell,
) -> Stage:
    queries = [query for each in tests for query in each.queries]
    name = stage_name(source.key, rules, [f"{file.name} {file.sha256}" for file in files], seed, queries)
    read = partial(read_source, source, [file.path for file in files], seed)
    return make_stage(source.key, rules, read, queries, folder / f"{name}.jsonl", work, tell)


def _read_tests(paths: Sequence[Path]) -> list[_TestSet]:
    return [_TestSet(path.name, file_hash(path), tuple(read_set(path))) for path in paths]


def file_hash(path: Path) -> str:
    """SHA-256 of the file. Raises BuildError."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BuildError(f"{str(path)!r} cannot be read: {error.strerror}", "check the path") from None


def _refuse_existing(out: Path, force: bool) -> None:
    """Raise BuildError where `out` exists, but with `force` only where it is no corpus."""
    if not out.exists():
        return
    if not force:
        raise BuildError(f"{str(out)!r} exists already", "give another name with -o, or --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file()):
        raise BuildError(f"{str(out)!r} is no corpus: it is not replaced", "give another name with -o")


def _check_space(out: Path, paths: Sequence[Path]) -> None:
    needed = _DISK * sum(path.stat().st_size * _PACKED.get(path.suffix, 1) for path in paths)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        what = f"{str(out.parent)!r} has {size(free, 1)} free; the corpus takes about {size(needed, 1)}"
        raise BuildError(what, "free some, or name another place with -o")


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """The folder beside `out` that an unfinished build works in, for this process alone. It goes when that is done, and
    where it fails before any stage is whole: the next build has nothing of it."""
    folder = out.with_name(f".{out.name}.partial")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if alone := stack.enter_context(lock(folder / "lock")):
                (folder / "stages").mkdir(exist_ok=True)
        except OSError as error:
            what = f"{str(folder)!r} cannot be written: {error.strerror}"
            raise BuildError(what, "name another place with -o") from None
        if not alone:
            raise BuildError(f"another build of {str(out)!r} is running", "wait until it ends")
        _recover(out)
        remove_leftovers(folder / "stages")
        try:
            with _cleared(folder):
                yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            hint = "free some and run it again: it goes on behind the sources that are done"
            raise BuildError(f"no space is left beside {str(out)!r}", hint) from None


@contextmanager
def _cleared(folder: Path) -> Iterator[None]:
    """Leave nothing in the end; where the block raises, what the next build goes on with: the stages, once one is
    whole."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder / "corpus", ignore_errors=True)
        if not any((folder / "stages").glob("*.json")):  # the last file of a stage
            _remove(folder)
        raise
    _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / "stages", ignore_errors=True)
    with suppress(OSError):
        (folder / "lock").unlink()  # last: a build that begins now finds nothing that will go
        folder.rmdir()


def _publish(made: Path, out: Path) -> None:
    """Give the folder its final name. Between the two renames the old one is beside it, whence `_recover` brings it."""
    old = _replaced(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(made, out)
    shutil.rmtree(old, ignore_errors=True)


def _recover(out: Path) -> None:
    old = _replaced(out)
    if old.exists() and not out.exists():
        os.rename(old, out)


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")
