"""Koala was published as a difference: add it to LLaMA's weights and the model is there, as a Hugging Face checkpoint.

The sum is streamed some rows at a time, so memory does not grow with the model. EasyLM's differences (Koala) and those
in Hugging Face's format (Vicuna's, for one) are added the same way: both are read in one layout.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from koala_local import wording
from koala_local.disk import FULL, nearest, sync
from koala_local.errors import KoalaError, ModelFileError
from koala_local.models.configuration import ModelConfig
from koala_local.models.json_file import member

from .safetensors_writer import (
    SHARD_BYTES,
    Progress,
    copy_file,
    nbytes,
    write_json,
    write_sharded,
)
from .sources.architecture import Checkpoint, TensorInfo
from .sources.stored import TORCH_TYPES, row_blocks
from .vocabulary.tokenizer_files import TOKENIZERS

Dtype = Literal["F32", "F16", "BF16"]

_BOS, _EOS, _UNKNOWN = 1, 2, 0  # of LLaMA 1's tokenizer; configurations of that time say otherwise and are wrong
_SPARE_BYTES = 64 << 20  # for everything but the weights
_HASH_BLOCK = 4 << 20
_CHECKLIST = 1 << 16  # characters


@dataclass(frozen=True, slots=True)
class Recovered:
    """What `recover` wrote."""

    folder: Path
    files: tuple[Path, ...]  # the weights
    dtype: str  # of the weights as written: "F32", "F16" or "BF16", or "mixed" where the base is
    size: int  # bytes of weights
    verified: tuple[Path, ...]  # inputs whose checksum was known and is right


@dataclass(frozen=True, slots=True)
class SumCheckpoint:
    """base + diff as a Checkpoint; every read adds, in float32, what it is asked for."""

    base: Checkpoint
    diff: Checkpoint
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    tokenizer_folder: Path | None

    @property
    def description(self) -> str:
        return f"{self.base.description} + {self.diff.description}"

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The sum, or some of its rows. Raises ModelFileError, also when it is not finite."""
        if name not in self.tensors:
            raise ModelFileError(f"there is no tensor {name[:100]!r} in {self.description}")
        info = self.tensors[name]
        start, stop, step = (rows or slice(None)).indices(info.shape[0])
        if step != 1:
            raise ValueError(f"rows of {name} must be contiguous, not every {step}th")
        total = torch.empty((max(stop - start, 0), *info.shape[1:]), dtype=TORCH_TYPES[info.dtype])
        for block in row_blocks(total.shape):
            part = slice(start + block.start, start + block.stop)
            total[block] = self.base.read(name, part).float().add_(self.diff.read(name, part).float())
            if not total[block].isfinite().all():
                what = f"{name}: base + difference is not a finite number in {info.dtype}"
                raise ModelFileError(what, "one of the files is damaged: download it again")
        return total


def sum_checkpoint(base: Checkpoint, diff: Checkpoint, dtype: Dtype | None = None) -> SumCheckpoint:
    """base + diff, elementwise, with the base's configuration: in `dtype`, or as the base is stored.
    Raises ModelFileError, naming the first tensor that differs, when the two are not of one model."""
    for here, there in zip_longest(base.tensors.values(), diff.tensors.values()):
        if here is None or there is None or (here.name, here.shape) != (there.name, there.shape):
            what = f"base and difference are not of one model: the base has {_shown(here)}, the difference"
            raise ModelFileError(
                f"{what} {_shown(there)}", "use the LLaMA of the size that the difference was made for"
            )
    infos = base.tensors.values()
    tensors = {info.name: replace(info, dtype=dtype or info.dtype) for info in infos}
    config = replace(base.config, name=diff.config.name or base.config.name)
    folder = base.tokenizer_folder or diff.tokenizer_folder
    return SumCheckpoint(base, diff, config, MappingProxyType(tensors), folder)


def recover(
    base: Checkpoint,
    diff: Checkpoint,
    out: Path,
    *,
    tokenizer_folder: Path | None = None,
    dtype: Dtype | None = None,
    checksums: Mapping[Path, str] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Recovered:
    """Write base + diff to the new folder `out`, a Hugging Face checkpoint with Koala's tokenizer and generation
    settings. The folder has its name only when it is complete; until then it is `out` with ".partial" added, and it is
    removed when anything fails. Tokenizer files come from `tokenizer_folder`, or from the base. `dtype` is the type
    of the written weights, the base's unless given. `checksums` are the SHA-256 or MD5 of input files, where known.

    Raises ModelFileError for what is wrong with the inputs, KoalaError when `out` exists or cannot be written."""
    total = sum_checkpoint(base, diff, dtype)
    tokenizer = _tokenizer_files(tokenizer_folder or total.tokenizer_folder)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    size = sum(map(nbytes, total.tensors.values()))
    _refuse_existing(out, partial)
    _check_checksums(checksums, progress)
    try:
        _check_space(partial, size)
        files = _write(total, partial, tokenizer, shard_bytes, progress)
        _refuse_existing(out, None)
        partial.rename(out)
        sync(out.absolute().parent)
    except OSError as error:
        raise _write_error(out, error) from None
    types = {info.dtype for info in total.tensors.values()}
    written = types.pop() if len(types) == 1 else "mixed"
    return Recovered(out, tuple(out / name for name in files), written, size, tuple(checksums))


def _write(
    total: SumCheckpoint, partial: Path, tokenizer: list[Path], shard_bytes: int, progress: Progress | None
) -> list[str]:
    """Everything but the folder's final name; the names of the weight files."""
    partial.mkdir(parents=True)
    try:
        infos = list(total.tensors.values())
        files = write_sharded(
            partial, infos, lambda info, rows: total.read(info.name, rows), shard_bytes=shard_bytes, progress=progress
        )
        write_json(partial / "config.json", configuration(total.config, infos[0].dtype))
        write_json(partial / "generation_config.json", _special_ids())
        write_json(partial / "tokenizer_config.json", _tokenizer_settings(total.config.context))
        write_json(partial / "special_tokens_map.json", _special_tokens())
        for path in tokenizer:
            copy_file(path, partial / path.name)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [path.name for path in files]


def configuration(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in the spelling that both old and new releases of transformers read, with LLaMA 1's special ids."""
    mistral = config.architecture == "MistralForCausalLM"
    return {
        "architectures": [config.architecture],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_scaling": dict(config.rope_scaling) or None,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": str(TORCH_TYPES[dtype]).removeprefix("torch."),
        **({"sliding_window": config.sliding_window} if mistral else {}),
        **_special_ids(),
    }


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": _UNKNOWN}


def _special_tokens() -> dict[str, str]:
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def _tokenizer_settings(context: int) -> dict[str, Any]:
    adding = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True}
    return {"tokenizer_class": "LlamaTokenizer", "model_max_length": context, **adding, **_special_tokens()}


def _tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        hint = "name the folder with LLaMA's tokenizer.model"
        raise ModelFileError("neither base nor difference comes with a tokenizer", hint)
    found = [member(folder, name) for name in TOKENIZERS if (folder / name).is_file()]
    if not found:
        raise ModelFileError(
            f"{str(folder)!r} holds no tokenizer.model", "name the folder with LLaMA's tokenizer.model"
        )
    return found


def _refuse_existing(out: Path, partial: Path | None) -> None:
    if out.exists() or out.is_symlink():
        raise KoalaError(f"{str(out)!r} exists already", "give another folder, or delete that one")
    if partial and partial.exists():
        what = f"{str(partial)!r} exists: another program is writing it, or one was stopped while it did"
        raise KoalaError(what, "delete it when nothing is writing it any more")


def known_checksums(folder: Path) -> dict[Path, str]:
    """What the `checklist.chk` that Meta published beside LLaMA's weights says of files that are there: MD5."""
    try:
        lines = (folder / "checklist.chk").read_text("utf-8", "replace")[:_CHECKLIST].splitlines()
    except OSError:
        return {}
    found = {
        match[2]: match[1] for line in lines if (match := re.fullmatch(r"([0-9a-f]{32})\s+\*?(\S+)", line.strip()))
    }
    return {member(folder, name): known for name, known in found.items() if (folder / name).is_file()}


def _check_checksums(checksums: Mapping[Path, str], progress: Progress | None) -> None:
    """Raise ModelFileError for a file whose SHA-256, or MD5, is another than the known one."""
    for path, known in checksums.items():
        kind = "SHA-256" if len(known) == 64 else "MD5"
        digest, done = hashlib.new(kind.replace("-", ""), usedforsecurity=False), 0
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                while block := file.read(_HASH_BLOCK):
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(path.name, done, size)
        except OSError as error:
            raise ModelFileError(f"{str(path)!r} cannot be read: {error.strerror}", "check the path") from None
        if digest.hexdigest() != known.lower():
            what = f"{path.name} has the {kind} {digest.hexdigest()}, not the known {known.lower()}"
            raise ModelFileError(what, "the file is damaged or was changed: download it again")


def _check_space(partial: Path, size: int) -> None:
    place = nearest(partial)
    free = shutil.disk_usage(place).free
    if free < size + _SPARE_BYTES:
        what = f"the model takes {wording.size(size)}, {str(place)!r} has {wording.size(free)} left"
        raise KoalaError(what, "free some space, or write to another disk")


def _write_error(out: Path, error: OSError) -> KoalaError:
    hint = (
        "free some space, or write to another disk" if error.errno in FULL else "check the folder and its permissions"
    )
    return KoalaError(f"{str(out)!r} cannot be written: {error.strerror or error}; nothing is left of it", hint)


def _shown(info: TensorInfo | None) -> str:
    return f"{info.name} of {' x '.join(map(str, info.shape))}" if info else "no further tensor"
