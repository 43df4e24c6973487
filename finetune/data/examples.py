"""Training examples, and the file of them that people read and the corpus is made from: one JSON object a line.

    {"source": "hh", "row": "train.jsonl:3", "system": "..", "turns": [{"user": "..", "reply": "..", "helpful": false}]}
    {"source": "mine", "row": "mine.jsonl:3", "text": ".."}

`system` is there where there is one, `helpful` where it is false; a plain text has `text` instead. A line with
`"held_out": true` is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_local.dialogue import Dialogue, Turn
from koala_local.disk import write_whole

_HELD_OUT = ', "held_out": true}'

Content = Dialogue | str  # a str is a plain text: nobody says it, and every token of it is trained on


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue whose every turn has a reply, or a plain text. `source` is the key of its source ("sharegpt"); `row`
    names the raw row in words a person can find it by ("all.jsonl:17"). `dropped` is what is said in the row and not in
    the content: it counts for the filter of keywords, and no line has it."""

    content: Content
    source: str
    row: str
    dropped: tuple[str, ...] = ()


def texts(content: Content) -> list[str]:
    """Everything that is said in the dialogue, in order; or the plain text."""
    if isinstance(content, str):
        return [content]
    said = [text for turn in content.turns for text in (turn.user, turn.reply or "")]
    return [content.system, *said] if content.system else said


def to_line(example: Example) -> str:
    """The example as one line, without its end."""
    content = example.content
    tree: dict[str, Any] = {"source": example.source, "row": example.row}
    tree |= {"text": content} if isinstance(content, str) else _dialogue_tree(content)
    return json.dumps(tree, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _dialogue_tree(dialogue: Dialogue) -> dict[str, Any]:
    turns = [
        {"user": turn.user, "reply": turn.reply} | ({} if turn.helpful else {"helpful": False})
        for turn in dialogue.turns
    ]
    return ({"system": dialogue.system} if dialogue.system else {}) | {"turns": turns}


def from_line(line: str) -> Example:
    """The example of a line that `to_line` wrote, held out or not."""
    tree = json.loads(line)
    if "text" in tree:
        return Example(tree["text"], tree["source"], tree["row"])
    turns = tuple(Turn(turn["user"], turn["reply"], turn.get("helpful", True)) for turn in tree["turns"])
    return Example(Dialogue(turns, tree.get("system", "")), tree["source"], tree["row"])


def hold_out(line: str) -> str:
    """The line, marked."""
    return line.removesuffix("}") + _HELD_OUT


def is_held_out(line: str) -> bool:
    """Whether the line is marked. The mark is the last key: no text of an example can look like it."""
    return line.rstrip("\n").endswith(_HELD_OUT)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file that this program wrote, without their ends."""
    with path.open(encoding="utf-8", errors="surrogatepass", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def read_examples(path: Path) -> Iterator[tuple[Example, bool]]:
    """The examples of a mix, and whether each is held out."""
    return ((from_line(line), is_held_out(line)) for line in read_lines(path))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write the lines, which may hold lone surrogates, as `write_whole` does."""
    write_whole(path, (f"{line}\n".encode("utf-8", "surrogatepass") for line in lines))


def write_tree(path: Path, tree: Any) -> None:
    """Write plain values as indented JSON, in the same way."""
    write_lines(path, [json.dumps(tree, indent=2, ensure_ascii=False)])
