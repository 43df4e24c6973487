"""The tokenizer's JSON files, read with bounds: nothing in them is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_local.errors import ModelFileError
from koala_local.models.json_file import parse_object

TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # one of them holds the vocabulary
_MIB = 2**20
LIMITS = {"tokenizer.json": 128 * _MIB, "tokenizer.model": 64 * _MIB}
_OTHER_LIMIT = 16 * _MIB


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the trained vocabulary. A special one is never matched in what a user writes."""

    id: int
    text: str
    special: bool


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def read_bytes(path: Path) -> bytes:
    """The content of a tokenizer file. Raises ModelFileError when it is unreadable or larger than any honest one."""
    limit = LIMITS.get(path.name, _OTHER_LIMIT)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", "check the folder and its permissions") from None
    if len(content) > limit:
        raise ModelFileError(f"{path} is larger than {limit // _MIB} MiB", "no tokenizer file is that large")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} when there is no such file. Raises ModelFileError for anything else."""
    if not path.is_file():
        return {}
    return parse_object(read_bytes(path), str(path))


def added_tokens(folder: Path) -> list[AddedToken]:
    """What added_tokens.json, tokenizer.json and tokenizer_config.json add, the later file deciding, in id order."""
    entries: list[tuple[Any, Any, Any]] = [
        (id_, text, False) for text, id_ in read_json(folder / "added_tokens.json").items()
    ]
    listed = read_json(folder / "tokenizer.json").get("added_tokens")
    entries += (
        [_entry(item.get("id"), item) for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    )
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries += [_entry(key, item) for key, item in decoder.items()]
    found: dict[int, AddedToken] = {}
    for id_, text, special in entries:
        token = _checked(id_, text, special)
        found[token.id] = token
    return [found[id_] for id_ in sorted(found)]


def _entry(id_: Any, item: Any) -> tuple[Any, Any, Any]:
    fields: Mapping[str, Any] = item if isinstance(item, dict) else {}
    return (int(id_) if isinstance(id_, str) and id_.isdecimal() else id_), fields.get("content"), fields.get("special")


def _checked(id_: Any, text: Any, special: Any) -> AddedToken:
    if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0 or not isinstance(text, str):
        raise ModelFileError(
            f"an added token is malformed: {str(text)[:80]!r} has the id {str(id_)[:40]!r}", "mend the file"
        )
    looks_special = text.startswith("<|") and text.endswith("|>")
    return AddedToken(id_, text, special is True or looks_special)


def special_text(settings: Mapping[str, Any], key: str) -> str:
    """The text of `bos_token` and its like, which is written as a string or as an object; "" when there is none."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
