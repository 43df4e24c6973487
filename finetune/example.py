"""One training example: a dialogue, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass

from koala_local.dialogue import Dialogue


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue whose every turn has a reply. `source` is the key of its source ("sharegpt"); `row` names the raw row
    in words a person can find it by ("all.jsonl:17")."""

    dialogue: Dialogue
    source: str
    row: str
