"""Topics of numbers and letters: small sums, counting, the alphabet."""

from __future__ import annotations

from random import Random

from facts import (
    NUMBER_WORDS,
    either,
)
from talk import Memory, Turn


def _sum(rng: Random, first: int, second: int, plus: bool) -> tuple[str, str, str]:
    """The question, the reply and the brief reply."""
    sign, word = ("+", "plus") if plus else ("-", "minus")
    result = first + second if plus else first - second
    worded = max(first, second) < len(NUMBER_WORDS) and rng.random() < 0.25
    if worded:
        expression = f"{NUMBER_WORDS[first]} {word} {NUMBER_WORDS[second]}"
    else:
        expression = rng.choice(
            (f"{first} {sign} {second}",) * 2 + (f"{first}{sign}{second}", f"{first} {word} {second}")
        )
    forms = either(
        "what is {}|{}|{}|how much is {}|calculate {}|{} = |{} is what|can you compute {}|give me {}|what does {} make"
    )
    user = rng.choice(forms).format(expression).strip()
    return user, f"{first} {sign} {second} = {result}.", f"{result}."


def _carry_on(rng: Random, total: int) -> tuple[str, str, str, int]:
    plus = total < 4 or (total < 20 and rng.random() < 0.6)
    step = rng.randint(1, min(5, 25 - total if plus else total))
    shown = rng.choice((str(step), NUMBER_WORDS[step]))
    if plus:
        forms = either(
            f"add {shown} to that|and plus {shown}|plus {shown}|now add {shown}|and {shown} more|+ {step}|add {shown}"
        )
        result, sign = total + step, "+"
    else:
        forms = either(
            f"take away {shown}|minus {shown}|now subtract {shown}|- {step}|and minus {shown}|"
            f"subtract {shown} from that"
        )
        result, sign = total - step, "-"
    return rng.choice(forms), f"{total} {sign} {step} = {result}.", f"{result}.", result


def sums(rng: Random, memory: Memory) -> list[Turn]:
    """A small sum and perhaps `add two to that`."""
    plus = rng.random() < 0.6
    if plus:
        total = rng.randint(0, 20)
        first = rng.randint(0, total)
        second = total - first
    else:
        first = rng.randint(0, 20)
        second = rng.randint(0, first)
        total = first - second
    user, reply, brief = _sum(rng, first, second, plus)
    turns = [Turn(user, reply, "a sum", brief)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        user, reply, brief, total = _carry_on(rng, total)
        turns.append(Turn(user, reply, "a sum", brief))
    return turns


def _count_turn(user: str, start: int, stop: int) -> Turn:
    step = 1 if stop >= start else -1
    reply = f"{', '.join(str(n) for n in range(start, stop + step, step))}."
    return Turn(user, reply, "counting", reply)


def _shown(rng: Random, number: int) -> str:
    """The number in figures or, if it is small, sometimes as a word."""
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) and rng.random() < 0.3 else str(number)


def counting(rng: Random, memory: Memory) -> list[Turn]:
    """Counting up, down, from one number to another, and the number after."""
    kind = rng.randrange(5)
    low, high = sorted(rng.sample(range(1, 21), 2))
    start, stop = (_shown(rng, number) for number in (low, high))
    if kind == 0:
        forms = either(
            f"count to {stop}|count from 1 to {stop}|can you count to {stop}|count up to {stop}|please count to {stop}"
        )
        return [_count_turn(rng.choice(forms), 1, high)]
    if kind == 1:
        high = min(high, 12)
        stop = _shown(rng, high)
        forms = either(
            f"count down from {stop}|count backwards from {stop}|countdown from {stop}|count down from {stop} to 1"
        )
        return [_count_turn(rng.choice(forms), high, 1)]
    if kind == 2:
        forms = either(
            f"count from {start} to {stop}|count up from {start} to {stop}|"
            f"the numbers from {start} to {stop}|from {start} to {stop}, count"
        )
        return [_count_turn(rng.choice(forms), low, high)]
    if kind == 3:
        forms = either(
            f"count from {stop} to {start}|count down from {stop} to {start}|count from {stop} down to {start}"
        )
        return [_count_turn(rng.choice(forms), high, low)]
    step, word = rng.choice(((1, "after"), (-1, "before")))
    forms = either(
        f"what comes {word} {high}|which number is {word} {high}|what number comes {word} {high}|number {word} {high}"
    )
    reply = f"{high + step} comes {word} {high}."
    return [Turn(rng.choice(forms), reply, "numbers", f"{high + step}.")]


def letters(rng: Random, memory: Memory) -> list[Turn]:
    """The letter before or after, and the alphabet."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if rng.random() < 0.25:
        forms = either("say the alphabet|what is the alphabet|tell me the ABC|list all letters")
        return [Turn(rng.choice(forms), f"{' '.join(alphabet)}.", "the alphabet")]
    index = rng.randrange(1, 25)
    step, word = rng.choice(((1, "after"), (-1, "before")))
    forms = either(
        f"which letter comes {word} {alphabet[index]}|"
        f"what letter is {word} {alphabet[index]}|the letter {word} {alphabet[index]}"
    )
    there = alphabet[index + step]
    return [Turn(rng.choice(forms), f"{there} comes {word} {alphabet[index]}.", "letters", f"{there}.")]
