"""The raw files of a source: found in a folder, or fetched from the Hugging Face hub.

find_raw(SOURCES["hc3"], Path("raw"))   raw/all.jsonl, packed with gzip or xz if need be, or everything in raw/hc3/
fetch(SOURCES["hc3"])                   the hub's files, from its cache where they are there
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from koala_local.errors import KoalaError
from koala_local.wording import first_line

from .raw_files import PACKED, SUFFIXES, unpacked_name
from .sources import IDENTITY, Source

Progress = Callable[[str, int, int], None]  # a file's name, bytes that are there, all bytes (0: unknown)

_PARQUET_REVISION = "refs/convert/parquet"  # where the hub keeps its own conversion of a dataset


class DownloadError(KoalaError):
    """Raw files that the hub does not give."""


class RawFilesMissing(KoalaError):
    """A folder without a source's raw files, or with one of them twice."""


def find_raw(source: Source, folder: Path) -> list[Path]:
    """The source's files below `folder`, in the order of their published names: those called so, and all data files in
    the subfolder named after the source's key, by name. The identity data comes with the program.

    Raises RawFilesMissing when there is none, or when one is there twice (plain and packed, for one)."""
    if source.key == IDENTITY.key:
        return packaged()
    if not folder.is_dir():
        raise RawFilesMissing(f"{str(folder)!r} is no folder", "name the folder with the raw files")
    own = folder / source.key
    published = [path for name in (*source.files, *source.converted) for path in _named(source, folder, name)]
    found = dict.fromkeys([*published, *(_data_files(own) if own.is_dir() else [])])
    _refuse_twice(found, folder, own)
    if not found:
        names = " or ".join((*source.files, *source.converted)[:4])
        hint = f"put {names} there, or any files of its schema into {str(own)!r}"
        raise RawFilesMissing(f"{str(folder)!r} holds no raw files of {source.title}", hint)
    return list(found)


def missing_files(source: Source, found: Sequence[Path]) -> list[str]:
    """The published names of the source's files that none of those found has. None where all found have other names:
    somebody chose them."""
    there = {name for name in (*source.files, *source.converted) if any(_is_called(path, name) for path in found)}
    if not there or (source.converted and there.issuperset(source.converted)):
        return []
    return [name for name in source.files if name not in there]


def fetch(source: Source, cache: Path | None = None, progress: Progress | None = None) -> list[Path]:
    """The source's files from the hub, in its own cache unless another is given; only what is not there is fetched.

    Raises DownloadError: no network, no such file, or a repository that wants a log-in."""
    if source.key == IDENTITY.key:
        return packaged()
    if not source.repository:
        raise DownloadError(f"{source.title} is not at the hub", "name its files")
    paths = [_fetch_file(source, name, None, cache, progress) for name in source.files]
    if paths and None not in paths:
        return [path for path in paths if path]
    converted = [_fetch_file(source, name, _PARQUET_REVISION, cache, progress) for name in source.converted]
    if converted and None not in converted:
        return [path for path in converted if path]
    names = " or ".join((*source.files, *source.converted)[:4])
    raise DownloadError(f"{source.repository} at the hub has no {names}", _by_hand(source))


def packaged() -> list[Path]:
    """The identity data, which comes with the program."""
    return [Path(__file__).with_name("sources") / name for name in IDENTITY.files]


def _named(source: Source, folder: Path, published: str) -> list[Path]:
    """What `folder` holds under the published name: in its folders or, where no other file is called so, in none."""
    path = PurePosixPath(published)
    last = [PurePosixPath(name).name for name in (*source.files, *source.converted)].count(path.name) == 1
    places = [folder / path.parent] if path.parts[:-1] else [folder]
    if last and published in source.files:
        places = list(dict.fromkeys([*places, folder]))
    stem = unpacked_name(path.name)
    names = [stem, *(stem + suffix for suffix in PACKED)]
    if not stem.endswith(".parquet"):
        names.append(f"{PurePosixPath(stem).stem}.parquet")
    return [place / name for place in places for name in names if (place / name).is_file()]


def _is_called(path: Path, published: str) -> bool:
    """Whether the path ends with the published name, but for what packs and converts the file."""
    name = _bare(PurePosixPath(published)).parts
    return _bare(path).parts[-len(name) :] == name


def _bare(path: PurePath) -> PurePath:
    return path.with_name(PurePath(unpacked_name(path.name)).stem)


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path))


def _is_data(path: Path) -> bool:
    return not path.name.startswith(".") and unpacked_name(path.name).endswith(SUFFIXES)


def _refuse_twice(found: dict[Path, None], folder: Path, own: Path) -> None:
    """Raise where two files are the same one, told by their names without what packs and converts them."""
    same: dict[str, list[Path]] = defaultdict(list)
    for path in found:
        place = path.parent.relative_to(own if path.is_relative_to(own) else folder)
        same[str(_bare(place / path.name))].append(path)
    for paths in same.values():
        if len(paths) > 1:
            names = " and ".join(repr(str(path)) for path in paths)
            raise RawFilesMissing(f"{names} have the name of one file", "keep one of them")


def _fetch_file(
    source: Source, name: str, revision: str | None, cache: Path | None, progress: Progress | None
) -> Path | None:
    """The file from the hub or its cache; None where the repository has no file of this name."""
    from huggingface_hub import errors, hf_hub_download

    try:
        found: Any = hf_hub_download(
            source.repository,
            name,
            repo_type="dataset",
            revision=revision,
            cache_dir=cache,
            tqdm_class=_bar(name, progress),
        )
    except errors.GatedRepoError:
        what = f"{source.repository} at the hub wants you to log in and accept its terms"
        raise DownloadError(what, f"`hf auth login`, or {_by_hand(source)}") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(f"the hub has no dataset {source.repository}", _by_hand(source)) from None
    except errors.LocalEntryNotFoundError:
        what = f"{source.repository} cannot be fetched: the hub is not reached, and its cache has no {name}"
        raise DownloadError(what, f"check the network, or {_by_hand(source)}") from None
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
        return None
    except OSError as error:  # the hub's HTTP errors are of this kind, too
        what = f"{source.repository} cannot be fetched: {first_line(error)}"
        raise DownloadError(what, f"try again, or {_by_hand(source)}") from None
    return Path(found)


def _bar(name: str, progress: Progress | None) -> Any:
    """A progress bar for the hub's client that draws nothing and tells `progress`."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined, unused-ignore]

    class Bar(tqdm):  # type: ignore[misc, valid-type, unused-ignore]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            quiet: dict[str, Any] = {**options, "file": io.StringIO(), "disable": False}
            super().__init__(*arguments, **quiet)  # type: ignore[no-untyped-call, unused-ignore]

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if progress:
                progress(name, int(self.n), int(self.total or 0))
            return shown

    return Bar


def _by_hand(source: Source) -> str:
    return f"download the files yourself and name their folder with --raw (here as {source.key}/..)"
