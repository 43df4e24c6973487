"""What every topic needs: the turn, the conversation's memory, articles and surface forms."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from facts import ANIMALS, FOODS, Animal, Food

LEADS = (
    "hey",
    "hi",
    "ok",
    "so",
    "well",
    "please",
    "koala",
    "hey koala",
    "um",
    "and now",
    "next question:",
    "tell me",
    "another question:",
    "I want to know",
    "can you tell me",
    "could you tell me",
    "I wonder",
    "a question:",
    "my friend asks",
    "do you know",
)
TAILS = (
    "please",
    "thanks",
    "koala",
    "then",
    "my friend",
    "by the way",
    "for me",
    "if you can",
    "exactly",
    "in your opinion",
    "if you know",
    "my dear",
    "again",
)
SHORT_FORMS = (
    ("what is ", "what's "),
    ("What is ", "What's "),
    ("who is ", "who's "),
    ("where is ", "where's "),
    ("I am ", "I'm "),
    ("do not ", "don't "),
    ("what is ", "whats "),
    ("you ", "u "),
    ("are you ", "r u "),
    ("colour", "color"),
    ("Colour", "Color"),
    ("favourite", "favorite"),
    (" and ", " & "),
    ("please", "pls"),
)
QUESTION_WORDS = ("what", "how", "where", "which", "who", "is", "can", "does", "do", "are", "name")


@dataclass(frozen=True)
class Turn:
    """One exchange; `about` says what it was about, `brief` is the reply in few words.

    `raw` keeps the user's text exactly as it is.
    """

    user: str
    reply: str
    about: str
    brief: str = ""
    raw: bool = False


@dataclass
class Memory:
    """What the conversation has brought so far."""

    name: str = ""
    colour: str = ""
    food: str = ""
    pet: tuple[str, str] | None = None
    age: str = ""
    about: str = ""
    reply: str = ""


def article(word: str) -> str:
    """`an` before a vowel, `a` otherwise."""
    return "an" if word[0] in "aeiou" else "a"


def a(thing: Animal | Food) -> str:
    """The name with its article, if it takes one: `an owl`, `rice`."""
    if isinstance(thing, Food):
        return f"{thing.article} {thing.name}".strip()
    return f"{article(thing.name)} {thing.name}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def known_animals(rng: Random) -> Animal:
    """One animal of the world."""
    return rng.choice(ANIMALS)


def known_foods(rng: Random) -> Food:
    """One food of the world."""
    return rng.choice(FOODS)


def join(words: list[str]) -> str:
    """`x, y and z`."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _typo(rng: Random, text: str) -> str:
    words = text.split(" ")
    long_ones = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long_ones:
        return text
    index = rng.choice(long_ones)
    word = words[index]
    at = rng.randrange(1, len(word) - 1)
    words[index] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        )
    )
    return " ".join(words)


def _question_like(text: str) -> bool:
    return text.lower().startswith(QUESTION_WORDS)


def _dress(rng: Random, text: str) -> str:
    """A word before or after, as people write them."""
    if rng.random() < 0.12 and _question_like(text):
        lead = rng.choice(LEADS)
        text = f"{lead}{' ' if lead[-1] == ':' else rng.choice((' ', ', '))}{text}"
    elif rng.random() < 0.08:
        text = f"{text.rstrip('?.!')}{rng.choice((' ', ', '))}{rng.choice(TAILS)}"
    return text


def surface(rng: Random, text: str) -> str:
    """The user's text in one of many surface forms: case, punctuation, short forms, typos."""
    for full, short in SHORT_FORMS:
        if full in text and rng.random() < 0.2:
            text = text.replace(full, short)
    text = _dress(rng, text)
    if rng.random() < 0.05:
        text = _typo(rng, text)
    if text[-1].isalnum():
        marks = ("?", "?", "", "", "??", "...") if _question_like(text) else (".", "", "", "!")
        text += rng.choice(marks)
    kind = rng.random()
    if kind < 0.5:
        return capital(text)
    if kind < 0.78:
        return text.lower()
    if kind < 0.81:
        return text.upper()
    return text
