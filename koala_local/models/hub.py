"""The hub's side of a model: what a repository holds, and getting its files into the cache that all tools share.

The cache keeps huggingface_hub's layout: blobs/OID, snapshots/COMMIT/NAME as links to them, refs/BRANCH. Nothing that
the hub answers is trusted: names, sizes and hashes are checked before a path is made of them.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from koala_local.disk import FULL, nearest, replacing, write_whole
from koala_local.models import cache
from koala_local.models.configuration import quantization_method
from koala_local.models.reference import HubReference, is_commit, is_oid, is_safe_name
from koala_local.models.transfer import HubError, Progress, Source, bytes_kept, fetch
from koala_local.models.variants import File
from koala_local.wording import size

_LOOK_S = 0.5  # from one look at a lock to the next
_LARGEST = 1 << 42  # bytes of a file that may be real
_ODD = "what the hub says of it cannot be right; do not use this repository"
_OFFLINE_HINT = "check the network; `koala list` shows the models that are here and need none"


class UnreachableError(HubError):
    """The hub does not answer, or must not be asked. What is in the cache can still be used."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one commit."""

    reference: HubReference
    commit: str
    files: tuple[File, ...]
    method: str = ""  # of quantization, as its config.json says

    @property
    def name(self) -> str:
        return self.reference.repository


def describe(reference: HubReference) -> Repository:
    """Ask the hub for the files of a repository. Raises HubError."""
    name = reference.repository
    with _explained(reference):
        try:
            info = HfApi(endpoint=constants.ENDPOINT).model_info(
                name, revision=reference.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            files = tuple(_checked(name, sibling) for sibling in info.siblings or ())
            commit, method = info.sha, quantization_method((info.config or {}).get("quantization_config"))
        except (KeyError, TypeError, AttributeError) as error:
            raise HubError(f"the hub's answer about {name} makes no sense ({error!r:.80})", _ODD) from None
    if not is_commit(commit) or commit is None:
        raise HubError(f"the hub names no commit of {name}", _ODD)
    return Repository(reference, commit, files, method)


def _checked(repository: str, sibling: Any) -> File:
    """One entry of the listing. Raises HubError for anything that could lead out of the cache."""
    name = sibling.rfilename
    if not is_safe_name(name):
        raise HubError(f"{repository} names a file {str(name)[:120]!r}, which may lead out of its folder", _ODD)
    lfs = sibling.lfs
    count, oid = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
    if type(count) is not int or not 0 <= count < _LARGEST or not is_oid(oid) or (lfs and len(oid) != 64):
        raise HubError(f"the hub gives no usable size and hash of {name} in {repository}", _ODD)
    return File(name, count, oid)


def missing(repository: Repository, files: Sequence[File]) -> int:
    """How many bytes of `files` are still to be brought."""
    blobs = cache.repository_folder(repository.name) / "blobs"
    absent = {file.oid: file for file in files if not (blobs / file.oid).exists()}
    return sum(file.size - bytes_kept(blobs / file.oid, file.size) for file in absent.values())


def download(repository: Repository, files: Sequence[File], progress: Progress) -> Path:
    """Bring `files` into the cache and return the folder of their snapshot. Raises HubError, or OSError of the disk.

    What is there already is not asked for again; what a stopped run has left is used."""
    folder = cache.repository_folder(repository.name)
    _check_space(missing(repository, files), folder)
    total, done = sum(file.size for file in files), 0
    for file in files:

        def step(count: int, _: int, what: str, file: File = file, before: int = done) -> None:
            progress(before + count, total, f"{what} {file.name}".strip())

        with _explained(repository.reference), _kept(folder):
            _bring(repository, file, folder, step)
        done += file.size
    snapshot = folder / "snapshots" / repository.commit
    for file in files:
        _link(folder / "blobs" / file.oid, snapshot / file.name)
    revision = repository.reference.revision or constants.DEFAULT_REVISION
    if revision != repository.commit:
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_whole(reference, [repository.commit.encode()])
    return snapshot


def _check_space(needed: int, folder: Path) -> None:
    there = nearest(folder)
    free = shutil.disk_usage(there).free
    if needed > free:
        what = f"the download takes {size(needed)}, but only {size(free)} are free in {str(there)!r}"
        raise HubError(what, "make room (`koala rm`), take a smaller type, or set HF_HOME to a larger disk")


def _bring(repository: Repository, file: File, folder: Path, progress: Progress) -> None:
    blob = folder / "blobs" / file.oid
    if blob.exists():
        return
    lock = cache.folder() / ".locks" / folder.name / f"{file.oid}.lock"  # huggingface_hub's own: others wait, too
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            with suppress(TimeoutError):
                stack.enter_context(WeakFileLock(lock, timeout=_LOOK_S))
                break
            progress(0, file.size, "waiting for another program that downloads")
        if blob.exists():
            return
        url = hf_hub_url(repository.name, file.name, revision=repository.commit, endpoint=constants.ENDPOINT)
        fetch(Source(url, build_hf_headers(), file.name, file.size, file.oid), blob, progress)


def _link(blob: Path, path: Path) -> None:
    """Make `path` in a snapshot lead to the blob; a copy where the system has no links."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        with replacing(path, seconds=math.inf) as temporary:
            shutil.copyfile(blob, temporary)


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a HubError that says what to do."""
    try:
        yield
    except (HfHubHTTPError, ConnectionError):  # OSErrors, too
        raise
    except OSError as error:
        what = f"the download cannot be written to {str(folder)!r}: {error.strerror or error}"
        hint = "make room there" if error.errno in FULL else "check that folder"
        raise HubError(what, f"{hint}; the same command goes on with what has come") from None


@contextmanager
def _explained(reference: HubReference) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError that says what to do."""
    try:
        yield
    except HubError:
        raise
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        _explain(error, reference)


def _explain(error: Exception, reference: HubReference) -> NoReturn:
    name = reference.repository
    match error:
        case GatedRepoError():
            what = f"{name} is gated: its owner shares it only with those who accept its terms"
            hint = f"accept them at {constants.ENDPOINT}/{name}, then `hf auth login`, or set HF_TOKEN"
        case RepositoryNotFoundError():
            what = f"there is no model {name} on the hub, or it is private"
            hint = "check the name; for a private one `hf auth login`, or set HF_TOKEN"
        case RevisionNotFoundError():
            what, hint = f"{name} has no revision {reference.revision!r}", "name a branch, a tag or a whole commit"
        case RemoteEntryNotFoundError():
            what, hint = f"the hub lists a file of {name} that it does not have", "try again later"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            what = f"the hub refuses access to {name} ({error.response.status_code})"
            hint = "HF_TOKEN, or the token of `hf auth login`, is wrong or may not read this model"
        case HfHubHTTPError():
            what, hint = f"the hub answers {error.response.status_code} for {name}", "try again later"
        case OfflineModeIsEnabled():
            hint = "unset it to download; `koala list` shows the models that are here"
            raise UnreachableError("HF_HUB_OFFLINE is set: nothing is downloaded", hint) from None
        case ValueError():
            what = f"the hub's answer about {name} makes no sense ({_reason(error)})"
            hint = "something between may have answered for it, such as a proxy or a sign-in page: try again later"
        case _:
            raise UnreachableError(f"the hub cannot be reached: {_reason(error)}", _OFFLINE_HINT) from None
    raise HubError(what, hint) from None


def _reason(error: Exception) -> str:
    with suppress(IndexError):
        return re.sub(r"^\[Errno -?\d+\] ", "", str(error).splitlines()[0])[:160]
    return type(error).__name__
