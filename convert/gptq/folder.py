"""The folder of a GPTQ checkpoint: what stands in it beside the weights, and how it comes to its final name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import koala_local
from koala_local.disk import lock, remove_leftovers, sync
from koala_local.errors import KoalaError
from koala_local.models.configuration import ModelConfig
from koala_local.models.json_file import member

from ..recover import configuration
from ..safetensors_writer import copy_file, write_json
from ..vocabulary.tokenizer_files import TOKENIZERS
from .matrix import GptqSettings

_MANIFEST = "run.json"
_COPIED = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def check_free(out: Path, force: bool) -> None:
    """Raise KoalaError where `out` is there and must not be replaced."""
    if out.exists() and not force:
        raise KoalaError(f"{str(out)!r} exists already", "give another folder, or --force to replace it")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Keep other runs away from `out`. Raises KoalaError where one is at work, and in place of an OSError."""
    guard = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock(guard, removed=True) as alone:
            if not alone:
                raise KoalaError(f"another run writes {str(out)!r}", "wait for its end, or give another folder")
            yield
    except OSError as error:
        what = f"{str(out)!r} cannot be written: {error.strerror or error}"
        raise KoalaError(what, "free some space or check the folder, then run the same command: it goes on") from None


def open_partial(partial: Path, manifest: Mapping[str, Any], force: bool) -> None:
    """Make the folder of an unfinished run, or keep the one that a run with the same manifest left."""
    if (partial / _MANIFEST).is_file():
        try:
            found = json.loads((partial / _MANIFEST).read_text("utf-8"))
        except ValueError:
            found = None
        if found == manifest:
            return
        if not force:
            other = [key for key in manifest if not isinstance(found, dict) or found.get(key) != manifest[key]]
            raise KoalaError(
                f"{str(partial)!r} is of a stopped run with other {', '.join(other)}",
                "repeat that command to go on with it, or give --force to begin anew",
            )
    elif (
        partial.exists() and not force and any(not path.name.startswith(f".{_MANIFEST}.") for path in partial.iterdir())
    ):
        raise KoalaError(f"{str(partial)!r} exists and is no stopped run", "delete it, or give --force")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / _MANIFEST, manifest)


def quantization_config(settings: GptqSettings) -> dict[str, Any]:
    """What config.json and quantize_config.json say. Columns were ordered by activation, but with static groups the
    file does not show it: `desc_act` is false."""
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "damp_percent": settings.damping,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"koala-local:{koala_local.__version__}"]},
    }


def model_config(config: ModelConfig) -> dict[str, Any]:
    """config.json, with the special ids of the source and nothing invented."""
    written = configuration(config, "F16")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        written.pop(key, None)
    eos = config.eos[0] if len(config.eos) == 1 else list(config.eos)
    ids = {"bos_token_id": config.bos, "eos_token_id": eos if config.eos else None}
    return written | {key: value for key, value in ids.items() if value is not None}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what tokenizer files there are. Raises ModelFileError for links that leave the folder."""
    for name in _COPIED:
        if (source / name).is_file():
            copy_file(member(source, name), target / name)


def publish(partial: Path, out: Path) -> None:
    """Give the complete folder its name; what had the name before is deleted after that."""
    remove_leftovers(partial)
    sync(partial)
    old = out.with_name(f"{out.name}.replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    (out / _MANIFEST).unlink()  # only now: killed before it, the same command finishes the run
    sync(out.parent)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()
