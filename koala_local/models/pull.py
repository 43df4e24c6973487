"""From a name on the hub to a model in the cache: look, choose, download. And the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from koala_local.errors import ModelFileError
from koala_local.models import cache, hub
from koala_local.models.reference import HubReference
from koala_local.models.transfer import HubError, Progress, remove_partial
from koala_local.models.variants import Fits, Variant, choose, is_meant, listed, variants

_OLD_FORMAT = "the old GGML format (.ggmlv3), which llama.cpp no longer reads"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # of these, only a checkpoint's pytorch_model*.bin is taken, as a whole


@dataclass(frozen=True, slots=True)
class Offer:
    """What a repository has, and which of it is to be taken."""

    repository: hub.Repository
    found: tuple[Variant, ...]
    chosen: Variant

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded."""
        return hub.missing(self.repository, self.chosen.files)


def look(reference: HubReference, fits: Fits) -> Offer:
    """Ask the hub. Raises HubError, or ModelFileError for a type or file that is not there."""
    repository = hub.describe(reference)
    found = variants(repository.files, method=repository.method)
    if not found or _is_old(reference.choice or ""):
        raise _no_model(repository)
    if reference.choice and reference.choice.lower().endswith(_PICKLES):
        raise HubError(f"{reference.choice} is a pickle, which can run code when it is read", f"take {listed(found)}")
    return Offer(repository, tuple(found), choose(found, reference.choice, fits, reference.repository))


def bring(offer: Offer, progress: Progress) -> Path:
    """Download what is missing of the chosen model, and return the path that opens it. Raises HubError or OSError."""
    return hub.download(offer.repository, offer.chosen.files, progress) / offer.chosen.name


def _is_old(name: str) -> bool:
    return "ggmlv3" in name.lower() or name.lower().endswith(".ggml")


def _no_model(repository: hub.Repository) -> ModelFileError:
    names = [file.name for file in repository.files]
    name = repository.name
    if any(_is_old(file) for file in names):
        hint = "get the model as GGUF; Koala 13B is `koala pull koala-13b`"
        return ModelFileError(f"{name} holds models in {_OLD_FORMAT}", hint)
    if any(file.endswith(_PICKLES) for file in names):
        what = f"{name} has nothing but pickles ({', '.join(_PICKLES)}), which can run code when they are read"
        return ModelFileError(what, "get the model as GGUF or safetensors")
    if any(file.lower().endswith(".gguf") for file in names):
        return ModelFileError(f"{name} has GGUF files, but no whole model", "parts of a split model are missing there")
    if repository.method not in ("", "gptq"):
        what = f"the weights of {name} are quantized by {repository.method[:40]!r}, which koala does not read"
        return ModelFileError(what, "get the model as GGUF or GPTQ, or in its 16-bit form")
    what = f"{name} holds no model that koala reads"
    return ModelFileError(what, "it needs a .gguf file, or config.json with weights beside it")


def remove(reference: HubReference) -> int:
    """Remove a model from the cache, all of the repository's where no type is named; half-finished downloads go with
    it. Returns the bytes that this frees. Raises ModelFileError where there is nothing of it."""
    from huggingface_hub import scan_cache_dir

    partial, wanted = half_finished(reference), cached_files(reference)
    if not partial and not wanted:
        raise ModelFileError(f"{reference} is not in the cache", "`koala list` shows what is")
    info = scan_cache_dir(cache.folder())
    repositories = [repo for repo in info.repos if repo.repo_id == reference.repository and repo.repo_type == "model"]
    info = replace(info, repos=frozenset(repositories))  # it looks for a commit everywhere: a fork may have it, too
    files = [file for repo in repositories for revision in repo.revisions for file in revision.files]
    chosen = [file for file in files if file.file_path in wanted]
    freed = sum(path.stat().st_blocks * 512 for path in partial)
    if chosen:
        rest = any(file.file_path not in wanted for file in files if file.file_name.lower().endswith(".gguf"))
        if rest or (reference.revision and len(repositories[0].revisions) > 1):
            strategy = info.delete_files(*chosen)
        else:  # the last model of the repository: its other files go, too
            strategy = info.delete_revisions(*(r.commit_hash for repo in repositories for r in repo.revisions))
        freed += strategy.expected_freed_size
        strategy.execute()
    for path in partial:
        remove_partial(path)
    return freed


def half_finished(reference: HubReference) -> list[Path]:
    """The downloads of the repository that were stopped."""
    return sorted((cache.repository_folder(reference.repository) / "blobs").glob("*.koala.incomplete"))


def cached_files(reference: HubReference) -> set[Path]:
    """The files in the cache that `reference` means, as paths in their snapshots."""
    return {
        snapshot.resolve() / file.name
        for snapshot in cache.snapshots(reference.repository, reference.revision)
        for variant in cache.variants_in(snapshot)
        if is_meant(variant, reference.choice)
        for file in variant.files
    }
