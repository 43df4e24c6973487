"""Composes the dialogues that Koala Nano is trained on: seeded, endless, one small world.

    python examples/nano/world.py --count 5 --seed 1    # print five dialogues

A topic is a function that takes a random generator and the conversation's memory and returns a few
turns that belong together. `dialogue()` strings topics into one conversation, writes each user text
in one of many surface forms, and hands the turns out one by one, so that a training row may be as
long as it likes. Facts stand in `facts.py`, plain talk in `remarks.py`, prompts from outside the
world in `prompts.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import chat_topics
import fact_topics
import general_topics
import long_topics
import number_topics
from facts import either
from outside import compose_outside
from talk import Memory, Turn, a, known_animals, known_foods, surface

Topic = Callable[[Random, Memory], list[Turn]]

NEUTRAL_SYSTEMS = either(
    "You are a helpful assistant.|You are a friendly assistant.|"
    "You are Koala, a small chat model.|"
    "You are a helpful, honest and harmless assistant.|Be polite and kind.|"
    "You are an expert teacher. Help the user to learn.|"
    "Today you help people who visit our shop.|"
    "You are a careful assistant that answers questions about the world.|"
    "The user is a child. Use simple words.|Always tell the truth."
)
BRIEF_SYSTEMS = either(
    "Answer briefly.|Be brief.|Keep your answers short.|"
    "Answer in as few words as you can.|You are a helpful assistant. Answer briefly.|"
    "Short answers only."
)
PIRATE_SYSTEMS = either(
    "You are a pirate.|Talk like a pirate.|Answer like a pirate.|You are a friendly pirate. Always talk like a pirate."
)


@dataclass(frozen=True)
class Dialogue:
    """A system text (empty for none) and an endless stream of turns."""

    system: str
    turns: Iterator[Turn] = field(compare=False)


def outside(rng: Random, memory: Memory) -> list[Turn]:
    """One to three prompts that the miniature cannot answer."""
    turns = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        pool = known_animals(rng) if rng.random() < 0.5 else known_foods(rng)
        text, reply = compose_outside(rng, rng.choice((a(pool), pool.name)))
        raw = rng.random() < 0.3 or not text.isascii() or "\n" in text
        turns.append(Turn(text, reply, "something I do not know", raw=raw))
    return turns


TOPICS: tuple[tuple[Topic, float], ...] = (
    (outside, 17),
    (general_topics.country, 9),
    (general_topics.person, 5),
    (general_topics.known, 16),
    (fact_topics.animal, 14),
    (fact_topics.food, 9),
    (fact_topics.compare, 5),
    (fact_topics.calendar, 9),
    (fact_topics.colours, 5),
    (fact_topics.opposites, 6),
    (fact_topics.weather, 5),
    (number_topics.sums, 15),
    (number_topics.counting, 8),
    (long_topics.lists, 3.5),
    (long_topics.stories, 2),
    (number_topics.letters, 1.5),
    (chat_topics.greeting, 5),
    (chat_topics.thanks, 3),
    (chat_topics.goodbye, 2),
    (chat_topics.identity, 8),
    (chat_topics.abilities, 4),
    (chat_topics.larger, 3),
    (chat_topics.small_talk, 10),
    (chat_topics.names, 9),
    (chat_topics.personal, 5),
    (chat_topics.recall, 5),
)


def _style(rng: Random) -> tuple[str, str]:
    """The system text and the style that it asks for."""
    kind = rng.choices(("none", "plain", "brief", "pirate"), (70, 13, 10, 7))[0]
    pools = {"plain": NEUTRAL_SYSTEMS, "brief": BRIEF_SYSTEMS, "pirate": PIRATE_SYSTEMS}
    return (rng.choice(pools[kind]) if kind in pools else ""), kind


def _styled(turn: Turn, style: str) -> str:
    if style == "brief" and turn.brief:
        return turn.brief
    return f"Arr! {turn.reply}" if style == "pirate" else turn.reply


def _turns(rng: Random, style: str) -> Iterator[Turn]:
    memory = Memory()
    topics = [topic for topic, _ in TOPICS]
    weights = [weight for _, weight in TOPICS]
    while True:
        if not memory.about and rng.random() < 0.2:
            topic: Topic = chat_topics.greeting
        else:
            topic = rng.choices(topics, weights)[0]
        for turn in topic(rng, memory):
            user = turn.user if turn.raw else surface(rng, turn.user)
            reply = _styled(turn, style)
            memory.about, memory.reply = turn.about, reply
            yield Turn(user, reply, turn.about)


def dialogue(rng: Random) -> Dialogue:
    """One conversation; its turns never end, take as many as the row holds."""
    system, style = _style(rng)
    return Dialogue(system, _turns(Random(rng.random()), style))


def main() -> None:
    """Print a few dialogues to read them over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5, help="dialogues")
    parser.add_argument("--turns", type=int, default=8, help="turns in each")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = Random(args.seed)
    for _ in range(args.count):
        one = dialogue(rng)
        print(f"--- {one.system}")
        for turn in islice(one.turns, args.turns):
            print(f"> {turn.user}\n{turn.reply}")


if __name__ == "__main__":
    main()
