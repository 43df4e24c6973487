"""One training example: a dialogue or a plain text, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass

from koala_local.dialogue import Dialogue

Content = Dialogue | str  # a str is a plain text: nobody says it, and every token of it is trained on


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue whose every turn has a reply, or a plain text. `source` is the key of its source ("sharegpt"); `row`
    names the raw row in words a person can find it by ("all.jsonl:17")."""

    content: Content
    source: str
    row: str
