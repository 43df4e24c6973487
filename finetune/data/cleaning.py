"""Which examples are left out for what they say: those that name another model, and those in another language.

The language is py3langid's guess. Its probabilities are poor on short texts and on code, so an example is left out only
where English is unlikely, not where it is unsure: of Alpaca, all English but for exercises in translation, this takes
one row in a thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

SHORTEST = 40  # letters; less text says too little of its language
HEAD = 1000  # characters from the start that are looked at
LEAST = 0.2  # of P(English) + P(no language), the latter for such as tables


def has_keyword(spoken: Iterable[str], keywords: Sequence[str]) -> bool:
    """Whether any text contains any of the keywords, which are in lower case, whatever its case."""
    return any(keyword in text for text in map(str.lower, spoken) for keyword in keywords)


def is_english(spoken: Iterable[str]) -> bool:
    """Whether the texts, taken together, may be English. True for what is too short to tell."""
    head = _head(spoken)
    return sum(map(str.isalpha, head)) < SHORTEST or english_probability(head) >= LEAST


def english_probability(text: str) -> float:
    """That the text is English, or in no language at all; all languages together make 1."""
    if sum(map(str.isupper, text)) > sum(map(str.islower, text)):
        text = text.lower()  # the model knows no shouting
    ranked: list[tuple[str, float]] = _identifier().rank(text)
    return sum(probability for language, probability in ranked if language in ("en", "zxx"))


def _head(spoken: Iterable[str]) -> str:
    parts: list[str] = []
    length = 0
    for text in spoken:
        parts.append(text[: HEAD - length])
        length += len(parts[-1]) + 1
        if length >= HEAD:
            break
    return "\n".join(parts).strip()


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
