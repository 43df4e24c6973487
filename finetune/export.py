"""The trained model as a plain Hugging Face checkpoint: sharded safetensors, config.json, generation settings and the
base's tokenizer. `transformers` loads it with identical logits, and `koala quantize` takes it.

Weights are gathered one tensor at a time, on all ranks, and written by rank 0, which holds one shard of the file in
memory at most: no rank ever has the whole model, and nothing is left to consolidate. Everything is written to a folder
beside the final one, with ".partial" added to its name, and moved when it is complete.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from koala_local.dialogue import KOALA_TEMPLATE
from koala_local.disk import FULL, nearest, sync
from koala_local.errors import KoalaError
from koala_local.models.json_file import parse_object
from koala_local.wording import size

from .checkpoint import is_writer
from .model import torch_dtype
from .sharding import plain_name
from .throughput import Numbers

Dtype = Literal["bfloat16", "float16", "float32"]
Progress = Callable[[int, int], None]  # bytes written, and bytes of all weights

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_SPARE_BYTES = 64 << 20  # for everything but the weights
_FAILURES = (KoalaError, OSError, SafetensorError)


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The tokenizer's: a configuration's are not believed, those of LLaMA 1's time were wrong."""

    bos: int
    eos: int
    pad: int | None = None


def export(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: PretrainedConfig,
    out: Path,
    tokenizer: Path,
    ids: SpecialIds,
    *,
    dtype: Dtype = "bfloat16",
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `weights` (of `exported_weights`, or merged ones) and transformers' `config` to the folder `out`, with the
    tokenizer in the folder (or file) `tokenizer` and Koala's chat template. `out` is new, or a run's folder without a
    checkpoint in it. `extra_files` are small files by name. All ranks must call this, with weights that are gathered
    in the same order; those that need no gathering are taken one at a time, and wanted of rank 0 alone: the others may
    give none. They return, or raise, together.

    Raises KoalaError when `out` holds a checkpoint, when it cannot be written, for want of space for one, and for a
    weight that is not finite in `dtype`; nothing is left then."""
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    needed = Numbers.of(config).parameters * torch_dtype(dtype).itemsize
    _on_writer(lambda: _begin(out, partial, needed))
    shards = _Shards(partial, shard_bytes)
    try:
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        told = (lambda: progress(shards.total, needed)) if progress else None
        failure = _write_weights(pairs, shards, torch_dtype(dtype), told)
        files = _small_files(tokenizer, configuration(config, ids, dtype))
        _on_writer(lambda: _finish(shards, out, {**files, **extra_files}), failure)
    except BaseException:
        if is_writer():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def exported_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by the names they have in a checkpoint; those tied to another are left out."""
    return {plain_name(name): weight for name, weight in model.named_parameters()}


def configuration(config: PretrainedConfig, ids: SpecialIds, dtype: Dtype) -> dict[str, Any]:
    """config.json of a transformers configuration, in the spelling that both its old and its new releases read."""
    values = json.loads(config.to_json_string())  # without what has its default in every kind of model
    rope = dict(values.get("rope_parameters") or {})
    base = rope.pop("rope_theta", 10000.0)
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    spelled = {"rope_theta": base, "rope_scaling": scaling, "torch_dtype": dtype, "dtype": dtype}
    used = {"use_cache": True, "attention_dropout": 0.0}
    return {
        **values,
        **spelled,
        **used,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }


@dataclass(slots=True)
class _Shards:
    """The weight files as they fill. Their names, which say how many there are, are given at the end."""

    folder: Path
    limit: int
    pending: dict[str, Tensor] = field(default_factory=dict)
    written: list[list[str]] = field(default_factory=list)  # names of tensors
    total: int = 0

    def add(self, name: str, weight: Tensor) -> None:
        """Raises KoalaError for a weight that is not finite."""
        if not weight.isfinite().all():
            what = f"{name} is not a finite number everywhere in {str(weight.dtype).removeprefix('torch.')}"
            raise KoalaError(what, "export an earlier checkpoint, or in another type")
        if self.pending and sum(each.nbytes for each in self.pending.values()) + weight.nbytes > self.limit:
            self.flush()
        self.pending[name] = weight
        self.total += weight.nbytes

    def flush(self) -> None:
        path = self.folder / f"shard-{len(self.written)}"
        path.touch()
        mode = path.stat().st_mode
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes a file for its owner alone
        sync(path)
        self.written.append(list(self.pending))
        self.pending = {}

    def close(self) -> bytes | None:
        """Write what is left and name the files; the index that they need, if there are several."""
        self.flush()
        count = len(self.written)
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            (self.folder / f"shard-{number}").rename(self.folder / name)
        where = {tensor: name for name, tensors in zip(names, self.written, strict=True) for tensor in tensors}
        return _json({"metadata": {"total_size": self.total}, "weight_map": where}) if count > 1 else None


def _write_weights(
    weights: Iterable[tuple[str, Tensor]], shards: _Shards, dtype: torch.dtype, told: Callable[[], None] | None
) -> Exception | None:
    """Gather all weights and write them, on rank 0. What fails there is returned, and gathering goes on: the other
    ranks know nothing of it and must not wait forever."""
    failure: Exception | None = None
    try:
        for name, weight in weights:
            whole = weight.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if failure is None and is_writer():
                failure = _failure_of(functools.partial(shards.add, name, whole.to("cpu", dtype).contiguous()))
            if told:
                told()
    except _FAILURES as error:  # of weights that are read from a file: the others gather nothing
        failure = failure or error
    return failure


def _begin(out: Path, partial: Path, needed: int) -> None:
    if (out / "config.json").exists() or (out.exists() and not out.is_dir()):
        raise KoalaError(f"{str(out)!r} holds a checkpoint already", "give another folder, or delete that one")
    place = nearest(partial.parent)
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        needs = f"{size(needed, 1)} and {size(_SPARE_BYTES, 1)} to spare"
        what = f"the model takes {needs}, {str(place)!r} has {size(free, 1)} left"
        raise KoalaError(what, "free some space, or write to another disk")
    if partial.exists():  # of an export that was killed: a run's folder has one owner
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _small_files(tokenizer: Path, values: Mapping[str, Any]) -> dict[str, bytes]:
    """Everything but the weights, by name."""
    paths = [tokenizer / name for name in TOKENIZER_FILES] if tokenizer.is_dir() else [tokenizer]
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    if not tokenizer.is_dir():
        files = {f"tokenizer{tokenizer.suffix}": content for content in files.values()}
    if "tokenizer.model" in files:
        files["tokenizer_config.json"] = _tokenizer_settings(files.get("tokenizer_config.json", b"{}"))
    special = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files["config.json"] = _json(values)
    files["generation_config.json"] = _json({key: value for key, value in special.items() if value is not None})
    files["chat_template.jinja"] = KOALA_TEMPLATE.encode()
    return files


def _tokenizer_settings(written: bytes) -> bytes:
    """tokenizer_config.json of a SentencePiece tokenizer. Without "legacy" transformers leaves out the space that
    training has behind a control token, and its chat template would give other ids than those trained on."""
    settings = parse_object(written, "tokenizer_config.json")
    return _json({"tokenizer_class": "LlamaTokenizer", **settings, "legacy": True})


def _finish(shards: _Shards, out: Path, files: Mapping[str, bytes]) -> None:
    """Write the small files and give everything its name: the whole folder, or, where a run's folder is there, file by
    file and config.json last, without which nothing takes a folder for a checkpoint."""
    partial = shards.folder
    index = shards.close()
    for name, content in {**files, **({"model.safetensors.index.json": index} if index else {})}.items():
        (partial / name).write_bytes(content)
        sync(partial / name)
    sync(partial)
    if not out.exists():
        partial.rename(out)
    else:
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)
        partial.rmdir()
        sync(out)
    sync(out.absolute().parent)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _on_writer(work: Callable[[], None], failure: Exception | None = None) -> None:
    """Do it on rank 0, unless there was a `failure` before. Raises what went wrong as a KoalaError, on all ranks."""
    if is_writer() and failure is None:
        failure = _failure_of(work)
    told = [_explained(failure) if failure else None]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise KoalaError(*told[0])


def _failure_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except _FAILURES as error:
        return error
    return None


def _explained(error: Exception) -> tuple[str, str]:
    """Message and hint. safetensors has its own error, with the system's text and number in it."""
    if isinstance(error, KoalaError):
        return error.message, error.hint
    number = error.errno if isinstance(error, OSError) else None
    full = number in FULL or f"os error {errno.ENOSPC}" in str(error)
    hint = "free some space, or write to another disk" if full else "check the folder and its permissions"
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"the checkpoint cannot be written: {what}; nothing is left of it", hint
