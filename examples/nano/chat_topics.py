"""Topics of talk: greetings, who Koala is, what it can do, small talk, what the user told it."""

from __future__ import annotations

from random import Random

from facts import COLOURS, DAYS, FOODS, JOKES, NAMES, PET_NAMES, either
from outside import pseudo_word
from remarks import (
    ABILITIES,
    GOODBYES,
    GREETING_REPLIES,
    GREETINGS,
    IDENTITY,
    LARGER_FORMS,
    LARGER_REPLY,
    SMALL_TALK,
    THANKS,
    TIMES_OF_DAY,
    Entry,
)
from talk import Memory, Turn, capital

_JOKE_FORMS = either("tell me a joke|make me laugh|do you know a joke|a joke please|tell a joke")


def _from(rng: Random, entries: tuple[Entry, ...]) -> Turn:
    forms, reply, about, brief = rng.choice(entries)
    text = rng.choice(JOKES) if reply == "JOKE" else reply
    return Turn(rng.choice(forms), text, about, brief)


def greeting(rng: Random, memory: Memory) -> list[Turn]:
    """A hello, with or without the time of day."""
    if rng.random() < 0.25:
        part = rng.choice(TIMES_OF_DAY)
        text = f"good {part}{rng.choice(('', '', ' koala', ' to you', '!'))}"
        return [Turn(text, f"Good {part}! How can I help you?", "nothing yet", f"Good {part}!")]
    reply = rng.choices(GREETING_REPLIES, (6, 2, 1))[0]
    if memory.name and rng.random() < 0.5:
        reply = f"Hello, {memory.name}! How can I help you?"
    return [Turn(rng.choice(GREETINGS), reply, "nothing yet", "Hello!")]


def thanks(rng: Random, memory: Memory) -> list[Turn]:
    """Thanks and the answer to them."""
    reply = rng.choices(("You are welcome!", "You are welcome. I am glad to help."), (4, 1))[0]
    return [Turn(rng.choice(THANKS), reply, "nothing, you thanked me", "You are welcome!")]


def goodbye(rng: Random, memory: Memory) -> list[Turn]:
    """A farewell."""
    text = rng.choice(GOODBYES)
    reply = "Good night! Sleep well." if "night" in text else "Goodbye! Come back soon."
    return [Turn(text, reply, "nothing, you said goodbye", "Goodbye!")]


def identity(rng: Random, memory: Memory) -> list[Turn]:
    """Who Koala is; its name most often."""
    count = rng.choice((1, 1, 1, 2))
    return [_from(rng, IDENTITY[:1] if rng.random() < 0.2 else IDENTITY) for _ in range(count)]


def abilities(rng: Random, memory: Memory) -> list[Turn]:
    """What Koala can do and what not."""
    return [_from(rng, ABILITIES[:1] if rng.random() < 0.35 else ABILITIES)]


def larger(rng: Random, memory: Memory) -> list[Turn]:
    """How to chat with a larger model."""
    return [Turn(rng.choice(LARGER_FORMS), LARGER_REPLY, "larger models", "`koala chat koala-13b`")]


def small_talk(rng: Random, memory: Memory) -> list[Turn]:
    """One or two everyday remarks, or a joke and another one."""
    if rng.random() < 0.12:
        more = either("another one|one more|another|more|again please|and another|tell me one more")
        return [
            Turn(rng.choice(_JOKE_FORMS if first else more), rng.choice(JOKES), "a joke") for first in (True, False)
        ]
    return [_from(rng, SMALL_TALK) for _ in range(rng.choice((1, 1, 2)))]


def _ask_name(rng: Random, memory: Memory) -> Turn:
    forms = either(
        "what is my name|do you know my name|who am I|do you remember my name|"
        "what did I say my name was|say my name|tell me my name"
    )
    if not memory.name:
        return Turn(
            rng.choice(forms),
            "You have not told me your name yet.",
            "your name",
            "I do not know it.",
        )
    reply = f"Your name is {memory.name}."
    return Turn(rng.choice(forms), reply, "your name", f"{memory.name}.")


def _tell_name(rng: Random, memory: Memory) -> Turn:
    made_up = rng.random() < 0.35
    memory.name = capital(pseudo_word(rng)) if made_up else rng.choice(NAMES)
    forms = either(
        "my name is {}|I am {}|call me {}|hi, I am {}|hello, my name is {}|my name's {}|"
        "you can call me {}|I'm {}|people call me {}|hey koala, I am {}|"
        "remember that my name is {}|no, my name is {}"
    )
    text = rng.choice(forms).format(memory.name)
    reply = f"Nice to meet you, {memory.name}!"
    return Turn(text, reply, "your name", reply, raw=made_up)


def names(rng: Random, memory: Memory) -> list[Turn]:
    """The user's name: told, asked for, or both with something between."""
    kind = rng.random()
    if kind < 0.35:
        return [_ask_name(rng, memory)]
    turns = [_tell_name(rng, memory)]
    if kind < 0.7:
        if rng.random() < 0.5:
            turns.append(_from(rng, SMALL_TALK + IDENTITY))
        turns.append(_ask_name(rng, memory))
    return turns


def _pet(rng: Random, memory: Memory) -> list[Turn]:
    kind = rng.choice(("dog", "cat", "rabbit", "parrot", "horse", "mouse", "fish", "hen"))
    memory.pet = (kind, rng.choice(PET_NAMES))
    kind, name = memory.pet
    told = rng.choice(
        either(f"I have a {kind} called {name}|my {kind} is called {name}|the name of my {kind} is {name}")
    )
    asked = rng.choice(either(f"what is my {kind} called|what is the name of my {kind}|do you remember my {kind}"))
    return [
        Turn(told, f"{name} is a nice name for a {kind}.", f"your {kind}"),
        Turn(asked, f"Your {kind} is called {name}.", f"your {kind}", f"{name}."),
    ]


def _favourite(rng: Random, memory: Memory) -> list[Turn]:
    kind, pool = rng.choice((("colour", COLOURS), ("food", tuple(food.name for food in FOODS)), ("day", DAYS)))
    pick = rng.choice(pool)
    told = rng.choice(
        either(f"my favourite {kind} is {pick}|I like the {kind} {pick} best|{pick} is my favourite {kind}")
    )
    asked = rng.choice(
        either(f"what is my favourite {kind}|which {kind} do I like best|do you remember my favourite {kind}")
    )
    about = f"your favourite {kind}"
    return [
        Turn(told, f"{capital(pick)} is a good choice.", about),
        Turn(asked, f"Your favourite {kind} is {pick}.", about, f"{capital(pick)}."),
    ]


def _age(rng: Random, memory: Memory) -> list[Turn]:
    memory.age = str(rng.randint(5, 99))
    told = rng.choice((f"I am {memory.age} years old", f"my age is {memory.age}", f"I am {memory.age}"))
    return [
        Turn(told, f"{memory.age} is a fine age.", "your age"),
        Turn(
            rng.choice(("how old am I", "what is my age", "do you know my age")),
            f"You are {memory.age} years old.",
            "your age",
            f"{memory.age}.",
        ),
    ]


def personal(rng: Random, memory: Memory) -> list[Turn]:
    """Something the user tells about themselves, and mostly the question for it."""
    turns = rng.choice((_pet, _favourite, _age))(rng, memory)
    if rng.random() < 0.4:
        turns.insert(1, _from(rng, SMALL_TALK + IDENTITY))
    return turns[: rng.choice((1, 2, 3, 3))]


def _asked_about(rng: Random, memory: Memory) -> Turn:
    forms = either(
        "what did I just ask|what did I ask you|what did I just say|what was my question|"
        "what was my last question|what were we talking about|what did we just talk about|"
        "do you remember my question"
    )
    reply = "You have not asked me anything yet."
    if memory.about:
        reply = f"It was about {memory.about}."
    return Turn(rng.choice(forms), reply, memory.about or "nothing yet", reply)


def _say_again(rng: Random, memory: Memory) -> Turn:
    forms = either(
        "say that again|repeat that|can you repeat that|what did you say|"
        "what did you just say|please repeat|once more please|again|I did not hear you"
    )
    reply = memory.reply.removeprefix("Arr! ") or "I have not said anything yet."
    return Turn(rng.choice(forms), reply, memory.about or "nothing yet", reply)


def recall(rng: Random, memory: Memory) -> list[Turn]:
    """Questions about the turn before."""
    if rng.random() < 0.55 or len(memory.reply) > 120:
        return [_asked_about(rng, memory)]
    return [_say_again(rng, memory)]
