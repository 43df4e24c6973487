"""Topics of general knowledge: countries, famous people, short facts, with follow-ups that need the turn before."""

from __future__ import annotations

from random import Random

from facts import either
from general_facts import COUNTRIES, KNOWN, PEOPLE
from talk import Memory, Turn, capital

_COUNTRY_FORMS = {
    "capital": either(
        "what is the capital of {c}|which city is the capital of {c}|capital of {c}|tell me the capital of {c}|"
        "do you know the capital of {c}|name the capital of {c}|what is {c}'s capital"
    ),
    "continent": either("where is {c}|on which continent is {c}|in which part of the world is {c}|is {c} in Europe"),
    "language": either(
        "what language do they speak in {c}|which language is spoken in {c}|what do people speak in {c}|language of {c}"
    ),
}
_COUNTRY_MORE = {
    "capital": either("and its capital|what is its capital|and the capital|capital?"),
    "continent": either("where is it|and where is that|which continent is that|on which continent is it"),
    "language": either("what do they speak there|which language do they speak|and the language|what language is it"),
}
_ANOTHER = either("and {c}|what about {c}|how about {c}|and of {c}|{c}?|and for {c}")


def _country_turn(country: tuple[str, ...], attribute: str, form: str) -> Turn:
    name, city, continent, language = country
    replies = {
        "capital": (f"The capital of {name} is {city}.", f"{city}."),
        "continent": (
            f"{name} is in {continent}." if continent != name else f"{name} is a continent.",
            f"{continent}.",
        ),
        "language": (f"Most people in {name} speak {language}.", f"{language}."),
    }
    reply, brief = replies[attribute]
    return Turn(form.format(c=name), reply, name, brief)


def country(rng: Random, memory: Memory) -> list[Turn]:
    """A question about a country, then follow-ups on it or the same question about another."""
    one, attribute = rng.choice(COUNTRIES), rng.choices(tuple(_COUNTRY_FORMS), (6, 2, 2))[0]
    turns = [_country_turn(one, attribute, rng.choice(_COUNTRY_FORMS[attribute]))]
    for _ in range(rng.choice((0, 1, 1, 2))):
        if rng.random() < 0.55:
            one, form = rng.choice(COUNTRIES), rng.choice(_ANOTHER)
        else:
            attribute = rng.choice(tuple(_COUNTRY_FORMS))
            form = rng.choice(_COUNTRY_MORE[attribute])
        turns.append(_country_turn(one, attribute, form))
    if rng.random() < 0.12:
        name, city = one[:2]
        forms = either(f"of which country is {city} the capital|where is {city}|what is {city}|tell me about {city}")
        turns.append(Turn(rng.choice(forms), f"{city} is the capital of {name}.", city, f"{name}."))
    return turns


def person(rng: Random, memory: Memory) -> list[Turn]:
    """Who somebody famous was, and what for."""
    name, what, known_for = rng.choice(PEOPLE)
    last = name.split()[-1]
    called = rng.choice((name, name, last))
    first = Turn(
        rng.choice(either("who was {p}|who is {p}|tell me about {p}|do you know {p}|{p}")).format(p=called),
        f"{name} was {what}, known for {known_for}.",
        name,
        f"{capital(what)}.",
    )
    why = Turn(
        rng.choice(either("what was {p} known for|why is {p} famous|what did {p} do|what is {p} famous for")).format(
            p=called
        ),
        f"{name} is known for {known_for}.",
        name,
        f"{capital(known_for)}.",
    )
    more = Turn(
        rng.choice(either("what for|why was that person famous|known for what|and what for|why are they famous")),
        f"{name} is known for {known_for}.",
        name,
        f"{capital(known_for)}.",
    )
    return rng.choice(([first], [first, more], [why]))


def known(rng: Random, memory: Memory) -> list[Turn]:
    """One or two short facts."""
    turns = []
    for _ in range(rng.choice((1, 1, 2))):
        forms, reply, about, brief = rng.choice(KNOWN)
        turns.append(Turn(rng.choice(forms), reply, about, brief))
    return turns
