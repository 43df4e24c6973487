"""Content into token ids, so that no text ever becomes a control token.

llama.cpp matches user-defined tokens in any text, even with special tokens unparsed, and a merge may happen to spell a
control token. So such strings are cut behind their first character, and the result is checked.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise

from koala_local.engine.base import Engine


def plain_ids(engine: Engine, text: str, markers: Collection[str], *, continues: bool = False) -> list[int]:
    """Token ids of `text` as plain text; `markers` are further strings that must not be matched whole.
    No id in the result is a control token's."""
    vocabulary = engine.vocabulary
    forbidden = frozenset(vocabulary.control.values()) | vocabulary.ends
    unknown = vocabulary.control.get("<unk>", -1)  # what a vocabulary without byte fallback makes of a rare character
    for taboo in ([*vocabulary.user_defined, *markers], [*vocabulary.user_defined, *markers, *vocabulary.control]):
        ids = _tokenize_parts(engine, _cut(text, taboo), continues)
        if not (forbidden - {unknown}).intersection(ids):
            return ids
    ids = _tokenize_parts(engine, list(text), continues)
    return [token for token in ids if token == unknown or token not in forbidden]


def _tokenize_parts(engine: Engine, parts: list[str], continues: bool) -> list[int]:
    ids: list[int] = []
    for index, part in enumerate(parts):
        ids += engine.tokenize(part, continues=continues or index > 0)
    return ids


def _cut(text: str, taboo: Collection[str]) -> list[str]:
    """`text` in parts none of which contains a string of `taboo`; one character cannot be cut."""
    # White space is left whole: some vocabularies hold runs of it as user-defined tokens, and were trained with them.
    strings = sorted((string for string in taboo if len(string) > 1 and string.strip()), key=len, reverse=True)
    if not strings:
        return [text]
    starts = re.finditer(f"(?=({'|'.join(map(re.escape, strings))}))", text)
    cuts = [0, *(match.start() + 1 for match in starts), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)] if len(cuts) > 2 else [text]
