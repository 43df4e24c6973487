"""What lies in huggingface_hub's cache, whoever has put it there. Needs no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from koala_local.errors import KoalaError
from koala_local.models.configuration import quantization_method, read_quantization
from koala_local.models.reference import PREFIX, HubReference, is_commit
from koala_local.models.variants import File, Variant, choose, is_meant, variants


def folder() -> Path:
    """Where the cache lies: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


def repository_folder(repository: str) -> Path:
    return folder() / (PREFIX + repository.replace("/", "--"))


def repositories() -> list[str]:
    """The models that the cache holds something of."""
    try:
        names = sorted(path.name for path in folder().iterdir() if path.name.startswith(PREFIX))
    except OSError:
        return []
    return [name.removeprefix(PREFIX).replace("--", "/", 1) for name in names]


def snapshots(repository: str, revision: str | None = None) -> list[Path]:
    """The snapshots to look into: the one of `revision`; without one, that of `main` first, then the newest."""
    home = repository_folder(repository)
    if revision is not None:
        commit = revision if is_commit(revision) else _commit_of(home, revision)
        found = [home / "snapshots" / commit] if commit else []
        return [path for path in found if path.is_dir()]
    try:
        found = [path for path in (home / "snapshots").iterdir() if path.is_dir()]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    main = _commit_of(home, "main")
    return sorted(found, key=lambda path: path.name != main)


def _commit_of(home: Path, revision: str) -> str | None:
    try:
        commit = (home / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def variants_in(snapshot: Path) -> list[Variant]:
    """The models in a snapshot that are there as a whole."""
    found = variants(_files(snapshot), method=method_of(snapshot))
    return [variant for variant in found if not variant.is_folder or _is_whole(snapshot, variant)]


def method_of(folder: Path) -> str:
    """Of the folder's quantization; "" where there is none, or it cannot be read."""
    try:
        return quantization_method(read_quantization(folder).values)
    except KoalaError:
        return ""


def _files(snapshot: Path) -> Iterator[File]:
    for path in snapshot.rglob("*"):
        if path.is_file():  # not so for a link to a blob that is gone
            yield File(path.relative_to(snapshot).as_posix(), path.stat().st_size)


def _is_whole(snapshot: Path, variant: Variant) -> bool:
    """Whether a folder has all the weights that its index names."""
    from koala_local.models.json_file import read_optional

    index = "pytorch_model.bin.index.json" if variant.type == "PYTORCH" else "model.safetensors.index.json"
    try:
        named = read_optional(snapshot / index).get("weight_map", {})
    except KoalaError:
        return False
    there = {file.name for file in variant.files}
    return isinstance(named, dict) and all(isinstance(name, str) and name in there for name in named.values())


def find(reference: HubReference) -> Path | None:
    """The file or folder of the model in the cache, None where it is not there. Without a type named, the best there.

    Raises ModelFileError for a type that several files have."""
    for snapshot in snapshots(reference.repository, reference.revision):
        found = [variant for variant in variants_in(snapshot) if is_meant(variant, reference.choice)]
        if found:
            return snapshot / choose(found, reference.choice, lambda size: None, str(reference)).name
    return None
