"""Content into token ids, so that no text ever becomes a control token.

llama.cpp matches user-defined tokens in any text, even with special tokens unparsed, and a merge may happen to spell a
control token. So such strings are cut behind their first character, and the result is checked.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise

from koala_local.engine.base import Engine


class PlainText:
    """Tokenizes content for one engine; `markers` are further strings that must not be matched whole."""

    def __init__(self, engine: Engine, markers: Collection[str] = ()) -> None:
        vocabulary = engine.vocabulary
        self._engine = engine
        self._matched = [*vocabulary.user_defined, *markers]
        self._control = list(vocabulary.control)
        # The unknown token is what a vocabulary without byte fallback makes of a rare character: no control.
        self._forbidden = (frozenset(vocabulary.control.values()) | vocabulary.ends) - {vocabulary.unknown}

    def ids(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`; no id among them is a control token's. `continues` as in `Engine.tokenize`."""
        for taboo in (self._matched, [*self._matched, *self._control]):
            ids = self._tokenize(_cut(text, taboo), continues)
            if self._forbidden.isdisjoint(ids):
                return ids
        return [token for token in self._tokenize(list(text), continues) if token not in self._forbidden]

    def _tokenize(self, parts: list[str], continues: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += self._engine.tokenize(part, continues=continues or index > 0)
        return ids


def _cut(text: str, taboo: Collection[str]) -> list[str]:
    """`text` in parts none of which contains a string of `taboo`; one character cannot be cut."""
    # White space is left whole: some vocabularies hold runs of it as user-defined tokens, and were trained with them.
    found = [string for string in taboo if len(string) > 1 and string in text and not string.isspace()]
    if not found:
        return [text]
    longest_first = sorted(found, key=len, reverse=True)
    starts = re.finditer(f"(?=({'|'.join(map(re.escape, longest_first))}))", text)
    cuts = [0, *(match.start() + 1 for match in starts), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]
