"""Which files of a repository make a model, and which of several such models to take. The same for the hub's listing
and for what lies in the cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from koala_local.errors import ModelFileError
from koala_local.models.quant_types import rank, type_in_name
from koala_local.wording import first_of

Fits = Callable[[int], bool | None]  # whether a model whose files have this size runs well here; None: not known

UNQUANTIZED = ("SAFETENSORS", "PYTORCH")  # checkpoints that `koala quantize` makes a model of; chat runs none
_FOLDER_FILES = (
    *("config.json", "quantize_config.json", "generation_config.json", "README.md"),  # the card: name and licence
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
_SAFETENSORS = ("*.safetensors", "model.safetensors.index.json")
_PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # opened by the converter alone, as weights only
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
_NO_MODEL = ("mmproj", "imatrix")  # GGUF files that are parts of something else
_SHOWN = 12


class File(NamedTuple):
    """A file of a repository. `oid`: its SHA-256, or git's SHA-1 of small ones; "" where it is not known."""

    name: str
    size: int
    oid: str = ""


class Variant(NamedTuple):
    """Files that are one model: a GGUF, the parts of a split one, or those of a checkpoint's folder."""

    type: str  # "Q4_K_M", "GPTQ", "PYTORCH", ..; "" where the name says nothing
    files: tuple[File, ...]

    @property
    def is_folder(self) -> bool:
        return self.type in ("GPTQ", *UNQUANTIZED)

    @property
    def name(self) -> str:
        """The file to open; "" for a folder."""
        return "" if self.is_folder else self.files[0].name

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def choice(self) -> str:
        """What stands behind the colon to mean this one."""
        return self.type or self.name


def variants(files: Iterable[File], *, method: str = "") -> list[Variant]:
    """The models among `files`, smallest first. A split GGUF with a part missing is none. `method`: how the weights of
    a checkpoint are quantized, as its config.json says."""
    files = sorted(files, key=lambda file: file.name)
    ggufs = [file for file in files if is_model_name(file.name)]
    found = _single(ggufs) + _split(ggufs)
    return sorted(found, key=lambda variant: variant.size) or _folder(files, method)


def is_model_name(name: str) -> bool:
    lowered = name.lower()
    return lowered.endswith(".gguf") and not any(word in lowered for word in _NO_MODEL)


def _single(ggufs: Sequence[File]) -> list[Variant]:
    return [Variant(type_in_name(file.name), (file,)) for file in ggufs if not _SPLIT.fullmatch(file.name)]


def _split(ggufs: Sequence[File]) -> list[Variant]:
    groups: dict[tuple[str, str], list[tuple[int, File]]] = {}
    for file in ggufs:
        if match := _SPLIT.fullmatch(file.name):
            groups.setdefault((match["stem"], match["parts"]), []).append((int(match["part"]), file))
    found = []
    for (stem, parts), members in groups.items():
        if [number for number, _ in members] == list(range(1, int(parts) + 1)):
            found.append(Variant(type_in_name(stem), tuple(file for _, file in members)))
    return found


def _folder(files: Sequence[File], method: str) -> list[Variant]:
    """The checkpoint that lies directly in the folder, if it is quantized by GPTQ or not at all; without what has code
    in it, and without pickles where there is anything else."""
    names = {file.name for file in files}
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    patterns = (*_FOLDER_FILES, *(_SAFETENSORS if safe else _PYTORCH))
    wanted = tuple(file for file in files if _matches(file.name, patterns))
    if "config.json" not in names or not any(_matches(file.name, ("*.safetensors", "*.bin")) for file in wanted):
        return []
    method = method or ("gptq" if "quantize_config.json" in names else "")
    kind = {"gptq": "GPTQ" if safe else "", "": "SAFETENSORS" if safe else "PYTORCH"}.get(method)
    return [Variant(kind, wanted)] if kind else []


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def choose(found: Sequence[Variant], choice: str | None, fits: Fits, where: str) -> Variant:
    """The variant that `choice` names; without one, the best (see PREFERENCE) of those that fit, of those of which
    nobody knows, else the smallest. Raises ModelFileError that says what there is instead."""
    if choice is None:
        return _best(found, fits)
    matching = [variant for variant in found if variant.type.lower() == choice.lower()]
    if not matching:
        matching = [variant for variant in found if is_meant(variant, choice)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(variant.name for variant in matching[:_SHOWN])
        raise ModelFileError(f"{where} has several files of type {choice}", f"name one of them: {names}")
    raise ModelFileError(f"{where} has no {choice!r}", f"it has {listed(found)}")


def is_meant(variant: Variant, choice: str | None) -> bool:
    """Whether `choice`, a type or a file with or without its folder, names this model; None means any."""
    names = {variant.type, *(name for file in variant.files for name in (file.name, file.name.rpartition("/")[2]))}
    return choice is None or choice.lower() in (name.lower() for name in names)


def _best(found: Sequence[Variant], fits: Fits) -> Variant:
    ordered = sorted(found, key=lambda variant: (rank(variant.type), variant.size))
    answers = [fits(variant.size) for variant in ordered]
    for wanted in (True, None):
        if wanted in answers:
            return ordered[answers.index(wanted)]
    return min(found, key=lambda variant: variant.size)


def listed(found: Sequence[Variant]) -> str:
    return first_of([variant.choice for variant in found], _SHOWN)
