"""Prompts from outside the small world, and the plain "I do not know that" that answers them.

A miniature that has only seen its own world answers everything with it. These prompts, of many
shapes, teach it where the world ends. `compose_outside(rng, inside)` returns one user text and its
reply; `inside` is a word from the world that may stand in a question the world cannot answer.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from facts import either
from prompts import (
    ACTIONS,
    ADVICE,
    CODAS,
    CODE,
    EMOJI,
    GLUE,
    HARM,
    INSIDE_QUESTIONS,
    LANGUAGES,
    LISTENS,
    LIVE,
    MATHS,
    NO_ACTION,
    NO_ADVICE,
    NO_ANIMAL,
    NO_CODE,
    NO_HARM,
    NO_LANGUAGE,
    NO_LONG,
    NO_MATHS,
    NO_NEWS,
    NO_REASON,
    NO_SENSE,
    NO_TASK,
    ONSETS,
    PEOPLE,
    PERSON_QUESTIONS,
    PHRASES,
    PLACE_QUESTIONS,
    PLACES,
    QUESTIONS,
    STATEMENTS,
    STRANGE,
    SUBJECTS,
    TASKS,
    UNKNOWN,
    VERBS,
    VOWELS,
    WHY,
)

Compose = Callable[[Random, str], tuple[str, str]]


def pseudo_word(rng: Random) -> str:
    """A word that is in no dictionary, of one to four syllables."""
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2, 2, 3, 4)))]
    return "".join(parts)


def _subject(rng: Random) -> str:
    pool = rng.choices((SUBJECTS, STRANGE, PEOPLE, PLACES, None), (60, 12, 4, 4, 20))[0]
    return rng.choice(pool) if pool else pseudo_word(rng)


def _name(rng: Random, known: tuple[str, ...]) -> str:
    if rng.random() < 0.7:
        return rng.choice(known)
    return pseudo_word(rng).capitalize()


def fill(rng: Random, template: str, inside: str) -> str:
    """The template with every slot filled; each number gets a number of its own."""
    values = {
        "s": _subject(rng),
        "t": _subject(rng),
        "p": _name(rng, PEOPLE),
        "l": _name(rng, PLACES),
        "x": rng.choice(STRANGE),
        "i": inside,
        "w": pseudo_word(rng),
        "v": rng.choice(VERBS),
        "y": str(rng.randint(1400, 2030)),
    }
    while "{n}" in template:
        template = template.replace("{n}", str(rng.randint(2, 99)), 1)
    while "{c}" in template:
        template = template.replace("{c}", str(rng.randint(26, 99)), 1)
    while "{b}" in template:
        template = template.replace("{b}", str(rng.randint(41, 10 ** rng.randint(2, 6))), 1)
    return template.format(**values)


def _question(rng: Random, inside: str) -> tuple[str, str]:
    pools = (QUESTIONS, INSIDE_QUESTIONS, PERSON_QUESTIONS, PLACE_QUESTIONS)
    pool = rng.choices(pools, (50, 20, 15, 15))[0]
    return fill(rng, rng.choice(pool), inside), rng.choices(UNKNOWN, (5, 3, 2))[0]


def _strange(rng: Random, inside: str) -> tuple[str, str]:
    word = rng.choice(STRANGE) if rng.random() < 0.6 else pseudo_word(rng)
    forms = either(
        "what does a {} eat|what is a {}|where does a {} live|what colour is a {}|"
        "how big is a {}|how does a {} taste|and a {}?|what sound does a {} make|"
        "can a {} fly|tell me about the {}|what about the {}?|how many legs does a {} have|"
        "is a {} sweet|what is the opposite of {}"
    )
    return rng.choice(forms).format(word), NO_ANIMAL


def _foreign(rng: Random, inside: str) -> tuple[str, str]:
    if rng.random() < 0.25:
        forms = either(
            f"translate {inside} into {rng.choice(LANGUAGES)}|"
            f"do you speak {rng.choice(LANGUAGES)}|"
            f"how do you say {inside} in {rng.choice(LANGUAGES)}|"
            f"answer in {rng.choice(LANGUAGES)}"
        )
        return rng.choice(forms), NO_LANGUAGE
    words = rng.choice(PHRASES).split()
    start = rng.randrange(len(words))
    size = rng.randint(1, 9)
    piece = words[start : start + size]
    if rng.random() < 0.3:
        rng.shuffle(piece)
    return " ".join(piece) + rng.choice(("", "?", "!", ".")), NO_LANGUAGE


def _random_letters(rng: Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 14)))


def _nonsense(rng: Random, inside: str) -> tuple[str, str]:
    kind = rng.randrange(8)
    if kind == 0:
        text = "".join(rng.choices(EMOJI, k=rng.randint(1, 5)))
    elif kind == 1:
        text = "".join(rng.choices("?!.,;:-#*/()[]{}<>@&%$=+_~^|\\\"'", k=rng.randint(1, 8)))
    elif kind == 2:
        text = "".join(chr(rng.randint(0xA1, 0x2FFF)) for _ in range(rng.randint(2, 9)))
    elif kind == 3:
        text = str(rng.randint(21, 10**9))
    elif kind == 4:
        text = rng.choice("bcdfghjklmnpqrstvwxyz") * rng.randint(3, 12)
    elif kind == 5:
        text = " ".join(rng.choices(GLUE, k=rng.randint(2, 6)))
    elif kind == 6:
        text = _random_letters(rng)
    else:
        text = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 6)))
    return text, NO_SENSE


def _sentence(rng: Random) -> str:
    words = [
        rng.choice(GLUE) if rng.random() < 0.7 else _subject(rng).removeprefix("the ")
        for _ in range(rng.randint(6, 18))
    ]
    return " ".join(words).capitalize() + "."


def _long_text(rng: Random, inside: str) -> tuple[str, str]:
    lead = rng.choice(("", "summarise this: ", "What does this mean?\n\n", "Read this:\n", "TL;DR "))
    text = rng.choice((" ", "\n", "\n\n")).join(_sentence(rng) for _ in range(rng.randint(3, 9)))
    return lead + text, NO_LONG


def _pool(templates: tuple[str, ...], reply: str) -> Compose:
    def compose(rng: Random, inside: str) -> tuple[str, str]:
        return fill(rng, rng.choice(templates), inside), reply

    return compose


KINDS: tuple[tuple[Compose, int], ...] = (
    (_question, 34),
    (_strange, 10),
    (_pool(LIVE, NO_NEWS), 9),
    (_pool(WHY, NO_REASON), 3),
    (_pool(STATEMENTS, LISTENS), 6),
    (_pool(TASKS, NO_TASK), 12),
    (_pool(CODE, NO_CODE), 8),
    (_pool(ACTIONS, NO_ACTION), 6),
    (_pool(HARM, NO_HARM), 4),
    (_pool(ADVICE, NO_ADVICE), 4),
    (_pool(MATHS, NO_MATHS), 9),
    (_foreign, 7),
    (_nonsense, 7),
    (_long_text, 3),
)


def compose_outside(rng: Random, inside: str) -> tuple[str, str]:
    """One prompt from outside the world and its reply."""
    compose = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
    return compose(rng, inside)
