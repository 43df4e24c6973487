"""Topics of facts: animals, food, calendar, colours, opposites, weather."""

from __future__ import annotations

from random import Random

from facts import (
    ANIMALS,
    COLOURED,
    COLOURS,
    DAYS,
    MIXES,
    MONTH_DAYS,
    MONTHS,
    OPPOSITES,
    ORDINALS,
    SEASONS,
    WEATHER,
    Animal,
    Food,
    either,
)
from talk import Memory, Turn, a, article, capital, join, known_animals, known_foods

# attribute -> (questions, follow-up questions); {a} is `a cat`, {p} is `cats`, {n} is `cat`
ANIMAL_FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what": (
        either(
            "what is {a}|tell me about {a}|tell me about {p}|what are {p}|describe {a}|"
            "what do you know about {p}|do you know {p}|do you know what {a} is|{p}|{n}|"
            "tell me about the {n}|{a}|I like {p}|I saw {a} today|let's talk about {p}"
        ),
        ("what is it", "tell me more about it", "describe it", "what kind of animal is it"),
    ),
    "food": (
        either(
            "what does {a} eat|what do {p} eat|what is the food of {a}|what do {p} like to eat|"
            "what should I feed {a}|what does the {n} eat|food of {p}|name the food of {a}"
        ),
        either(
            "what does it eat|and what does it eat|and its food|what is its food|"
            "what do they eat|food?|and what do they like to eat|and the food?"
        ),
    ),
    "home": (
        either(
            "where does {a} live|where do {p} live|what is the home of {a}|"
            "where can I find {p}|where does the {n} live|where do I find {a}|"
            "in what place do {p} live"
        ),
        either(
            "where does it live|and where does it live|where do they live|and its home|"
            "where can I find it|and where|home?"
        ),
    ),
    "colour": (
        either(
            "what colour is {a}|which colour are {p}|what is the colour of {a}|"
            "what colour are {p}|what colour does {a} have|colour of {a}"
        ),
        either(
            "what colour is it|and its colour|and the colour|which colour does it have|"
            "what is its colour|colour?|what about its colour"
        ),
    ),
    "size": (
        either(
            "how big is {a}|what size is {a}|how big are {p}|is {a} big|is {a} small|"
            "are {p} big|how large is {a}|how small is {a}"
        ),
        ("how big is it", "and its size", "is it big", "is it small", "what size is it", "size?"),
    ),
    "sound": (
        either(
            "what sound does {a} make|what does {a} say|what do {p} say|how does {a} sound|"
            "which sound do {p} make|what noise does {a} make|sound of {a}"
        ),
        either("what sound does it make|what does it say|and its sound|and the sound|what noise does it make|sound?"),
    ),
    "legs": (
        either(
            "how many legs does {a} have|how many legs do {p} have|does {a} have legs|"
            "number of legs of {a}|how many legs has {a}"
        ),
        either("how many legs does it have|and its legs|how many legs|and how many legs|does it have legs|legs?"),
    ),
    "fly": (
        ("can {a} fly", "do {p} fly", "can {p} fly", "is {a} able to fly", "does {a} fly"),
        ("can it fly", "does it fly", "can they fly", "and can it fly"),
    ),
}
ANIMAL_WEIGHTS = {
    "what": 4,
    "food": 4,
    "home": 4,
    "colour": 3,
    "size": 2,
    "sound": 2,
    "legs": 2,
    "fly": 1.5,
}
OTHER_FORMS = ("and {a}", "what about {a}", "and the {n}", "and {p}", "how about {a}", "{a}?")

FOOD_FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what": (
        either(
            "what is {a}|tell me about {a}|describe {a}|do you know {a}|{n}|do you like {n}|"
            "I like {n}|what kind of food is {a}|is {a} a fruit|is {a} a vegetable"
        ),
        ("what is it", "what kind of food is it", "is it a fruit", "is it a vegetable"),
    ),
    "colour": (
        either("what colour is {a}|what is the colour of {a}|which colour is {a}|colour of {n}"),
        ("what colour is it", "and its colour", "and the colour", "colour?", "what is its colour"),
    ),
    "taste": (
        either(
            "how does {a} taste|what does {a} taste like|what is the taste of {a}|is {a} sweet|"
            "is {a} sour|taste of {n}|is {a} good to eat"
        ),
        either("how does it taste|and its taste|and the taste|is it sweet|is it sour|taste?|what does it taste like"),
    ),
}


def _animal_reply(animal: Animal, attribute: str) -> tuple[str, str]:
    """The reply and its brief form."""
    it = capital(a(animal))
    noise = f"A {animal.name} says {animal.sound}" if animal.sound else ""
    replies = {
        "what": (
            (
                f"{it} is {article(animal.size)} {animal.size} {animal.kind}. "
                f"It eats {animal.food} and lives {animal.home}."
            ),
            f"{capital(article(animal.size))} {animal.size} {animal.kind}.",
        ),
        "food": (f"{it} eats {animal.food}.", f"{capital(animal.food)}."),
        "home": (f"{it} lives {animal.home}.", f"{capital(animal.home)}."),
        "colour": (f"{it} is often {animal.colour}.", f"{capital(animal.colour)}."),
        "size": (f"{it} is {animal.size}.", f"{capital(animal.size)}."),
        "sound": (
            f"{it} goes {animal.sound}." if noise else f"{it} is mostly quiet.",
            f"{capital(animal.sound)}." if noise else "Mostly none.",
        ),
        "legs": (f"{it} has {animal.legs} legs.", f"{capital(animal.legs)} legs."),
        "fly": (
            f"Yes, {a(animal)} can fly." if animal.flies else f"No, {a(animal)} cannot fly.",
            "Yes." if animal.flies else "No.",
        ),
    }
    return replies[attribute]


def _food_reply(food: Food, attribute: str) -> tuple[str, str]:
    it = capital(a(food))
    replies = {
        "what": (
            f"{it} is a {food.kind}. It is {food.colour} and tastes {food.taste}.",
            f"A {food.kind}.",
        ),
        "colour": (f"{it} is often {food.colour}.", f"{capital(food.colour)}."),
        "taste": (f"{it} tastes {food.taste}.", f"{capital(food.taste)}."),
    }
    return replies[attribute]


def animal_turn(animal: Animal, attribute: str, form: str) -> Turn:
    """A question about one attribute of an animal, in the given form."""
    user = form.format(a=a(animal), p=animal.plural, n=animal.name)
    reply, brief = _animal_reply(animal, attribute)
    return Turn(user, reply, f"the {animal.name}", brief)


def food_turn(food: Food, attribute: str, form: str) -> Turn:
    """A question about one attribute of a food, in the given form."""
    user = form.format(a=a(food), p=a(food), n=food.name)
    reply, brief = _food_reply(food, attribute)
    return Turn(user, reply, food.name, brief)


def _attribute(rng: Random) -> str:
    return rng.choices(list(ANIMAL_WEIGHTS), list(ANIMAL_WEIGHTS.values()))[0]


def animal(rng: Random, memory: Memory) -> list[Turn]:
    """A question about an animal, then follow-ups that need it or move to another animal."""
    one, attribute = known_animals(rng), _attribute(rng)
    turns = [animal_turn(one, attribute, rng.choice(ANIMAL_FORMS[attribute][0]))]
    for _ in range(rng.choice((0, 1, 1, 2, 2))):
        if attribute != "what" and rng.random() < 0.35:
            one = known_animals(rng)
            form = rng.choice(OTHER_FORMS)
        else:
            attribute = _attribute(rng)
            form = rng.choice(ANIMAL_FORMS[attribute][1])
        turns.append(animal_turn(one, attribute, form))
    return turns


def food(rng: Random, memory: Memory) -> list[Turn]:
    """A question about a food, then follow-ups."""
    one, attribute = known_foods(rng), rng.choice(list(FOOD_FORMS))
    turns = [food_turn(one, attribute, rng.choice(FOOD_FORMS[attribute][0]))]
    for _ in range(rng.choice((0, 1, 1, 2))):
        if attribute != "what" and rng.random() < 0.35:
            one = known_foods(rng)
            form = rng.choice(("and {a}", "what about {a}", "how about {a}", "{a}?"))
        else:
            attribute = rng.choice(list(FOOD_FORMS))
            form = rng.choice(FOOD_FORMS[attribute][1])
        turns.append(food_turn(one, attribute, form))
    return turns


def _compare_numbers(rng: Random) -> Turn:
    first, second = rng.sample(range(21), 2)
    word, winner = rng.choice((("bigger", max(first, second)), ("smaller", min(first, second))))
    forms = either(
        f"which is {word}, {first} or {second}|is {first} {word} than {second}|"
        f"what is {word}: {first} or {second}|which number is {word}, {first} or {second}"
    )
    reply = f"{winner} is {word} than {first + second - winner}."
    return Turn(rng.choice(forms), reply, "numbers", f"{winner}.")


def compare(rng: Random, memory: Memory) -> list[Turn]:
    """Which of two numbers or animals is bigger; only animals that are clearly apart."""
    if rng.random() < 0.25:
        return [_compare_numbers(rng)]
    small = rng.choice(ANIMALS[:-8])
    large = rng.choice(ANIMALS[small.rank + 8 :])
    first, second = rng.sample((small, large), 2)
    word, winner = rng.choice((("bigger", large), ("smaller", small)))
    loser = small if winner is large else large
    forms = either(
        f"which is {word}, {a(first)} or {a(second)}|"
        f"what is {word}, the {first.name} or the {second.name}|"
        f"is {a(first)} {word} than {a(second)}|"
        f"who is {word}: {first.name} or {second.name}|"
        f"{first.name} or {second.name}, which one is {word}"
    )
    reply = f"{capital(a(winner))} is {word} than {a(loser)}."
    about = f"the {first.name} and the {second.name}"
    return [Turn(rng.choice(forms), reply, about, f"{capital(a(winner))}.")]


def _neighbour(rng: Random, cycle: tuple[str, ...], noun: str) -> list[Turn]:
    index = rng.randrange(len(cycle))
    step, words = rng.choice(
        ((1, ("after", "that follows", "that comes after")), (-1, ("before", "that comes before")))
    )
    turns = []
    for number in range(rng.choice((1, 1, 2))):
        here, there = cycle[index], cycle[(index + step) % len(cycle)]
        forms = either(
            f"which {noun} is {words[0]} {here}|what {noun} comes {words[0]} {here}|"
            f"what comes {words[0]} {here}|name the {noun} {words[-1]} {here}"
        )
        more = (f"and {words[0]} that", "and then" if step == 1 else "and before that")
        reply = f"{there} comes {words[0]} {here}."
        form = rng.choice(more if number else forms)
        turns.append(Turn(form, reply, f"the {noun}s", f"{there}."))
        index = (index + step) % len(cycle)
    return turns


def _month(rng: Random) -> Turn:
    index = rng.randrange(12)
    month = MONTHS[index]
    season = SEASONS[((index + 1) % 12) // 3]
    kind = rng.randrange(3)
    if kind == 0:
        forms = either(
            f"how many days does {month} have|how many days are in {month}|how long is {month}|days in {month}"
        )
        days = MONTH_DAYS[index]
        return Turn(rng.choice(forms), f"{month} has {days} days.", month, f"{days} days.")
    if kind == 1:
        forms = either(f"what season is {month}|in which season is {month}|is {month} in summer|is it cold in {month}")
        return Turn(
            rng.choice(forms),
            f"{month} is a {season} month in the north.",
            month,
            f"{capital(season)}.",
        )
    forms = either(
        f"what is the {ORDINALS[index]} month|name the {ORDINALS[index]} month of the year|"
        f"which month is the {ORDINALS[index]}"
    )
    return Turn(rng.choice(forms), f"The {ORDINALS[index]} month is {month}.", "the months", f"{month}.")


def _calendar_fact(rng: Random) -> Turn:
    day = rng.choice(DAYS)
    weekend = day in DAYS[5:]
    facts = (
        (
            either("how many days are in a week|how many days does a week have|days in a week"),
            "A week has seven days.",
            "the week",
            "Seven.",
        ),
        (
            ("how many months are in a year", "how many months does a year have"),
            "A year has twelve months.",
            "the year",
            "Twelve.",
        ),
        (
            ("what are the seasons", "how many seasons are there", "name the seasons"),
            "There are four seasons: spring, summer, autumn and winter.",
            "the seasons",
            "Four.",
        ),
        (
            ("how many hours are in a day", "how many hours does a day have"),
            "A day has 24 hours.",
            "the day",
            "24.",
        ),
        (
            ("how many days are in a year", "how many days does a year have"),
            "A year has 365 days, and a leap year has 366.",
            "the year",
            "365.",
        ),
        (
            (f"is {day} a weekend day", f"is {day} on the weekend", f"do people work on {day}"),
            f"{day} is a day of the {'weekend' if weekend else 'working week'}.",
            day,
            "Weekend." if weekend else "Working week.",
        ),
    )
    forms, reply, about, brief = rng.choice(facts)
    return Turn(rng.choice(forms), reply, about, brief)


def calendar(rng: Random, memory: Memory) -> list[Turn]:
    """Days of the week, months and seasons."""
    kind = rng.random()
    if kind < 0.4:
        return _neighbour(rng, DAYS, "day")
    if kind < 0.6:
        return _neighbour(rng, MONTHS, "month")
    return [_month(rng) if kind < 0.8 else _calendar_fact(rng)]


def colours(rng: Random, memory: Memory) -> list[Turn]:
    """What is blue, and what red and yellow make."""
    if rng.random() < 0.5:
        first, second, result = rng.choice(MIXES)
        one, two = rng.sample((first, second), 2)
        forms = either(
            f"what do {one} and {two} make|what colour do you get from {one} and {two}|"
            f"mix {one} and {two}|{one} plus {two}|what happens when I mix {one} with {two}"
        )
        reply = f"{capital(one)} and {two} make {result}."
        return [Turn(rng.choice(forms), reply, "colours", f"{capital(result)}.")]
    if rng.random() < 0.2:
        forms = ("name some colours", "which colours do you know", "name three colours", "colours")
        picks = rng.sample(COLOURS, 3)
        return [Turn(rng.choice(forms), f"{capital(join(picks))} are colours.", "colours")]
    thing, colour = rng.choice(COLOURED)
    forms = either(f"what colour is {thing}|what is the colour of {thing}|colour of {thing}|which colour has {thing}")
    reply = f"{capital(thing)} is {colour}."
    return [Turn(rng.choice(forms), reply, thing, f"{capital(colour)}.")]


def opposites(rng: Random, memory: Memory) -> list[Turn]:
    """The opposite of a word, then of others."""
    turns = []
    for number in range(rng.choice((1, 1, 2))):
        word, other = rng.choice(OPPOSITES)
        if rng.random() < 0.5:
            word, other = other, word
        forms = either(
            f"what is the opposite of {word}|opposite of {word}|give me the opposite of {word}|"
            f'what is the opposite of "{word}"|which word is the opposite of {word}|'
            f"what is the contrary of {word}"
        )
        more = (f"and of {word}", f"and the opposite of {word}", f"what about {word}")
        form = rng.choice(more if number else forms)
        reply = f"The opposite of {word} is {other}."
        turns.append(Turn(form, reply, "opposites", f"{capital(other)}."))
    return turns


def weather(rng: Random, memory: Memory) -> list[Turn]:
    """What rain is and what to do; today's weather is not known."""
    thing, meaning, advice = rng.choice(WEATHER)
    kind = rng.random()
    if kind < 0.3:
        forms = either(
            "how is the weather|what is the weather like|what is the weather today|"
            "will it rain tomorrow|is it raining|is it cold outside|is the sun shining|"
            "weather?|do I need an umbrella|how warm is it|what is the temperature|"
            "will it snow|weather forecast|tell me the weather"
        )
        reply = "I cannot see outside, so I do not know the weather. Please look out of the window."
        return [Turn(rng.choice(forms), reply, "the weather", "I do not know.")]
    if kind < 0.65:
        forms = (
            f"what is {thing}",
            f"tell me about {thing}",
            f"explain {thing}",
            f"describe {thing}",
        )
        return [Turn(rng.choice(forms), f"{capital(thing)} is {meaning}.", thing, f"{capital(meaning)}.")]
    forms = either(
        f"what should I do in {thing}|what do I do when there is {thing}|"
        f"there is {thing} outside, what now|what should I wear in {thing}|I see {thing}"
    )
    return [Turn(rng.choice(forms), f"{advice}.", thing, f"{advice}.")]
