"""Topics with long replies: bullet lists, fact sheets and tiny stories."""

from __future__ import annotations

from random import Random

from facts import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    MONTHS,
    NUMBER_WORDS,
    Animal,
    either,
)
from talk import Memory, Turn, a, known_animals


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _picks(rng: Random) -> Turn:
    """A bullet list of three to six things of a kind."""
    where = rng.choice(("on a farm", "in the forest", "on the plain", "in the jungle"))
    groups = (
        ("animals", [one.name for one in ANIMALS]),
        ("birds", [one.name for one in ANIMALS if one.kind == "bird"]),
        ("insects", [one.name for one in ANIMALS if one.kind == "insect"]),
        (f"animals that live {where}", [one.name for one in ANIMALS if one.home == where]),
        ("fruits", [one.name for one in FOODS if one.kind == "fruit"]),
        ("vegetables", [one.name for one in FOODS if one.kind == "vegetable"]),
        ("drinks", [one.name for one in FOODS if one.kind == "drink"]),
        ("sweet foods", [one.name for one in FOODS if one.taste == "sweet"]),
        ("colours", list(COLOURS)),
    )
    noun, pool = rng.choice(groups)
    count = rng.randint(2, min(6, len(pool)))
    shown = rng.choice((NUMBER_WORDS[count], str(count)))
    forms = either(
        f"list {shown} {noun}|name {shown} {noun}|give me {shown} {noun}|"
        f"give me a list of {shown} {noun}|can you name {shown} {noun}"
    )
    start = rng.randrange(len(pool))
    # in the order of the table: the next item is then certain, and none comes twice
    picks = [pool[(start + step) % len(pool)] for step in range(count)]
    reply = f"Here are {NUMBER_WORDS[count]} {noun}:\n\n{_bullets(picks)}"
    return Turn(rng.choice(forms), reply, noun)


def _profile(rng: Random) -> Turn:
    one = known_animals(rng)
    forms = either(
        f"tell me everything about {one.plural}|give me a profile of {a(one)}|"
        f"all you know about {one.plural}|make a fact sheet about {a(one)}"
    )
    lines = either(
        f"**Kind:** {one.kind}|**Size:** {one.size}|**Colour:** {one.colour}|"
        f"**Food:** {one.food}|**Home:** {one.home}|**Legs:** {one.legs}"
    )
    reply = f"**The {one.name}**\n\n{_bullets(list(lines))}"
    return Turn(rng.choice(forms), reply, f"the {one.name}")


def _fixed_list(rng: Random) -> Turn:
    forms, lead, items, about = rng.choice(
        (
            (
                either(
                    "list the days of the week|what are the days of the week|name the days|"
                    "days of the week|name all days of the week"
                ),
                "The days of the week are:",
                list(DAYS),
                "the days",
            ),
            (
                either(
                    "list the months|what are the months|name all months of the year|months of the year|name the months"
                ),
                "The months of the year are:",
                list(MONTHS),
                "the months",
            ),
            (
                ("list the seasons in a list", "make a list of the seasons"),
                "The seasons are:",
                ["spring", "summer", "autumn", "winter"],
                "the seasons",
            ),
        )
    )
    return Turn(rng.choice(forms), f"{lead}\n\n{_bullets(items)}", about)


def lists(rng: Random, memory: Memory) -> list[Turn]:
    """A bullet list."""
    return [rng.choices((_picks, _profile, _fixed_list), (5, 3, 3))[0](rng)]


def _meeting(one: Animal, friend: Animal, day: str, sky: str) -> str:
    return (
        f"Once there was a little {one.name}. It lived {one.home}. One {sky} {day} the "
        f"{one.name} was hungry and went out to look for {one.food}. On the way it met "
        f'{a(friend)}. "Good morning," said the {friend.name}. "Where are you going?" '
        f'"I am looking for {one.food}," said the {one.name}. The {friend.name} knew a good place, '
        f"and they went there together. They ate until they were full. In the evening the two "
        f"friends walked home under the stars. The end."
    )


def _lost(one: Animal, friend: Animal, day: str, sky: str) -> str:
    return (
        f"On a {sky} {day} a young {one.name} was lost. It wanted to go home, but it could "
        f'not find the way. "Can you help me?" it asked {a(friend)}. "Of course," said the '
        f"{friend.name}. "
        f'"Where do you live?" The {one.name} said that it lived {one.home}. So they walked for a '
        f"long time, and they sang a song. When they came home, the {one.name} was very happy and "
        f"gave the {friend.name} some {friend.food}. From that day on they were friends. The end."
    )


def _party(one: Animal, friend: Animal, day: str, sky: str) -> str:
    return (
        f"It was a {sky} {day}, and the {one.name} had a birthday. All the animals came. The "
        f"{friend.name} came first and brought some {one.food}. They played, they danced and they "
        f'ate a big cake. "This is the best day of the year," said the {one.name}. At night '
        f"everybody was tired. The {one.name} went to bed and slept until the sun came up. The end."
    )


def stories(rng: Random, memory: Memory) -> list[Turn]:
    """A tiny story about an animal, and perhaps a question about who was in it."""
    one, friend = rng.sample(ANIMALS, 2)
    day = rng.choice(DAYS)
    sky = rng.choice(("rainy", "sunny", "cold", "warm", "windy"))
    forms = either(
        f"tell me a story about {a(one)}|write a story about {a(one)}|"
        f"a story about {a(one)} please|a story with {a(one)}|tell me a story|"
        "can you tell me a story|I want to hear a story|write a short story|another story"
    )
    story = rng.choice((_meeting, _lost, _party))(one, friend, day, sky)
    turns = [Turn(rng.choice(forms), story, f"a story about {a(one)}")]
    if rng.random() < 0.5:
        asks = (
            ("who was in the story", f"The {one.name} and the {friend.name} were in the story."),
            ("which day was it in the story", f"It was a {day}."),
            ("did you like the story", "Yes, I like stories about animals."),
        )
        user, reply = rng.choice(asks)
        turns.append(Turn(user, reply, "the story"))
    return turns
