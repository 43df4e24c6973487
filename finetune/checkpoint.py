"""A run's checkpoints: written in the background by all ranks, named when complete, the newest few kept.

`step-00000200/` holds torch's distributed checkpoint (each rank wrote its part; any number of ranks can read it) and
`run.json`: the step, what decides the run's numbers, and the size of every file. Until it is complete the folder has
".partial" added to its name, so that a folder with a final name is whole, whenever the program was killed.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from koala_local.disk import FULL, nearest, sync, write_whole
from koala_local.errors import KoalaError
from koala_local.wording import first_line

from .launch import LostError, is_lost

_FORMAT = "koala-checkpoint-1"
_ABOUT = "run.json"
_NEARLY_NOTHING = 1 << 20  # bytes that are left of a disk
_TORN = "delete that folder to go on from the checkpoint before it"
# The classes that torch itself puts into `.metadata`, a pickle: nothing else is made of one.
_METADATA = (
    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_METADATA_NAMES = (
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in _METADATA),
    *("torch.distributed.checkpoint.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
)


class CheckpointError(KoalaError):
    """A checkpoint that cannot be written, is damaged, or is of another run."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint on disk. `about` is what `save` was given."""

    folder: Path
    step: int  # optimizer steps done
    about: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every rank has one of these, and calls it at the same steps."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.newest = -1  # step of the checkpoint that was saved, or read, last
        self._pending: Future[None] | None = None
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        # Background collectives must not mix with those of the training steps, so they have a group of their own.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, step: int, state: dict[str, Any], about: Mapping[str, Any], *, at_once: bool = False) -> None:
        """Write `state` in the background, as it is now. Waits for the save before. Raises CheckpointError when that
        one failed. `at_once` waits for this one, too: for tensors that torch cannot copy aside, such as torchao's."""
        self.wait()
        if step == self.newest:
            return
        self.newest = step
        final = self.folder / f"step-{step:08}"
        partial = final.with_name(f"{final.name}.partial")
        if is_writer():
            self._begin(partial)
        self._barrier()
        where: dict[str, Any] = {"checkpoint_id": partial, "process_group": self._group}
        where["no_dist"] = self._group is None
        write: Callable[[], object] = functools.partial(save_parts, state, **where)
        if not at_once:
            written = async_save(state, **where)
            assert isinstance(written, Future)
            write = written.result
        self._pending = self._threads.submit(self._finish, write, partial, final, {"step": step, **about})
        if at_once:
            self.wait()

    def check(self) -> None:
        """Raise the CheckpointError of a save that has failed meanwhile. Does not wait."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises CheckpointError when that failed, LostError when it
        did for want of another rank."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _begin(self, partial: Path) -> None:
        try:
            for leftover in self.folder.glob("step-*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        except OSError as error:
            raise _write_error(partial, error, self.folder) from None

    def _finish(self, write: Callable[[], object], partial: Path, final: Path, about: dict[str, Any]) -> None:
        """Write all ranks' files, or wait for them. Then, on rank 0, describe them, name the folder, drop old ones."""
        try:
            write()
            if is_writer():
                _describe(partial, about)
                partial.rename(final)
                sync(self.folder)
                for old in complete(self.folder)[: -self.keep]:
                    shutil.rmtree(old)
        except (CheckpointException, OSError, RuntimeError) as error:
            full = _is_full(self.folder)  # before anything is removed: torch's writer does not say why it failed
            if is_writer():
                shutil.rmtree(partial, ignore_errors=True)
            if any(map(is_lost, _causes(error))):
                raise LostError from error
            raise _write_error(final, error, self.folder, full=full) from None

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in the folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial" and path.is_dir())


def latest(folder: Path) -> Saved | None:
    """The newest checkpoint in the folder, or None. Raises CheckpointError when it is damaged or none of a run."""
    found = complete(folder)
    return read_saved(found[-1]) if found else None


def read_saved(folder: Path) -> Saved:
    """What the checkpoint in `folder` says of itself. Raises CheckpointError when anything of it is missing."""
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
        if about["format"] != _FORMAT:
            raise CheckpointError(f"{str(folder)!r} is of the format {str(about['format'])[:40]!r}, not {_FORMAT}")
        step, files = int(about["step"]), dict(about["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{str(folder)!r} is no checkpoint of a run: {_ABOUT} is missing or damaged", _TORN
        ) from None
    for name, size in files.items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{str(folder)!r} is damaged: {path.name} is missing or of another size", _TORN)
    return Saved(folder, step, about)


def load(saved: Saved, state: dict[str, Any]) -> None:
    """Fill the tensors of `state`, on all ranks, from the checkpoint. Raises CheckpointError."""
    try:
        _Reader(saved.folder).read_metadata()  # before torch would report what is wrong with it on its own
        reader = _Reader(saved.folder)
        load_parts(state, storage_reader=reader, planner=_Planner(), no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        what = f"{str(saved.folder)!r} cannot be read, or is of another model: {_reason(error)}"
        raise CheckpointError(what, _TORN) from None


class _Reader(FileSystemReader):
    """torch's reader, for which `.metadata` could be any pickle."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole in _METADATA_NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {whole[:80]}")


class _Planner(DefaultLoadPlanner):
    """torch's planner, for which whatever is no tensor could be any pickle, in place of a tensor, too."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            found = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:  # torch's words advise to run it
            raise pickle.UnpicklingError(f"{read_item.dest_index.fqn[:80]} holds more than plain values") from None
        plain = io.BytesIO()
        torch.save(found, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _describe(partial: Path, about: Mapping[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    write_whole(partial / _ABOUT, [json.dumps({"format": _FORMAT, **about, "files": files}, indent=2).encode()])
    sync(partial)


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(nearest(folder)).free < _NEARLY_NOTHING
    except OSError:
        return False


def _write_error(final: Path, error: BaseException, folder: Path, *, full: bool = False) -> CheckpointError:
    cause = next((each for each in _causes(error) if isinstance(each, OSError)), None)
    last = complete(folder)
    kept = f"{last[-1].name} is the last one" if last else "there is none yet"
    full = cause.errno in FULL if cause else full
    reason = os.strerror(errno.ENOSPC) if full and cause is None else _reason(error)
    hint = "free some space" if full else "check the folder, its permissions and its disk"
    return CheckpointError(
        f"the checkpoint {final.name} cannot be written: {reason}; {kept}", f"{hint}, then go on with --resume"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The errors of all ranks behind a failed save, and what each was raised from."""
    first = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    chain: list[BaseException] = []
    for each in first:
        link: BaseException | None = each
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__ or link.__context__
    return chain


def _reason(error: BaseException) -> str:
    causes = _causes(error)
    best = next((each for each in causes if isinstance(each, OSError) and each.strerror), causes[0])
    return best.strerror if isinstance(best, OSError) and best.strerror else first_line(best)


def is_writer() -> bool:
    """Whether this rank writes what one writes for all."""
    return not dist.is_initialized() or dist.get_rank() == 0
