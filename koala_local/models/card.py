"""What a folder's README.md says of its model in the metadata that the hub reads: its name and its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

UNSTATED = "see-below"  # the licence's name in a card that states none
_LARGEST = 1 << 20  # bytes
_LONGEST = 200  # characters of a name or a licence


class Card(NamedTuple):
    """Empty where nothing is stated. Text of a file: not to be printed unfiltered."""

    name: str = ""
    licence: str = ""


def read_card(folder: Path) -> Card:
    """The card in `folder`; an empty one where it is missing or makes no sense, which stops nothing."""
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    try:
        found: Any = metadata_load(path) if path.stat().st_size <= _LARGEST else {}
    except Exception:  # of the file, of its encoding, or one of YAML's many
        return Card()
    found = found if isinstance(found, dict) else {}
    licence = _text(found.get("license"))
    if licence == "other":
        licence = _text(found.get("license_name"))
    return Card(_text(found.get("model_name")), "" if licence == UNSTATED else licence)


def _text(value: object) -> str:
    return " ".join(value.split())[:_LONGEST] if isinstance(value, str) else ""
