"""Evaluates the finished Koala Nano file: fixed prompts, none of them in the training data.

    python examples/nano/check_nano.py koala_local/nano/koala-nano-q4_k_m.gguf
    python examples/nano/check_nano.py FILE.gguf --ask "hello" "what is your name"   # one chat

Every prompt is asked in a fresh chat, after twenty and after sixty earlier turns, greedily and at
temperature 0.7. Counted: right content, a whole sentence, and a reply that ends by itself within
300 tokens. Then a drill over every fact of the world, in a wording that the training data has.
Needs llama-cpp-python; the ids are built field by field, as in training.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from llama_cpp import Llama

from fact_topics import ANIMAL_FORMS, FOOD_FORMS, animal_turn, food_turn
from facts import ANIMALS, DAYS, FOODS, MONTHS, OPPOSITES
from world import dialogue

BOS, EOS, LIMIT = 1, 2, 300
WHOLE = re.compile(r"^(Arr! )?[A-Z0-9*\-`].*([.!?]|\n- .+)$", re.DOTALL)
OUT = r"do not know|cannot|miniature|sorry|not understand|no clock|too hard|too long"
PASTED = (
    "The committee met on the third floor to discuss the annual budget. Several members were not "
    "satisfied with the figures that the treasurer had prepared, and they asked for a new report. "
    "After a long debate it was agreed that the meeting should be continued in two weeks, when the "
    "figures from the other offices would be available. The chair thanked all who had come."
)


@dataclass(frozen=True)
class Case:
    """User texts in order, and a pattern for the reply to the last one."""

    users: tuple[str, ...]
    expected: str


CASES = (
    Case(("Would you tell me your name?",), "Koala"),
    Case(("What's your name, little one?",), "Koala"),
    Case(("Hello there, Koala, nice to see you",), "Hello|Hi|nice|kind"),
    Case(("Good evening, dear Koala",), "Good evening|Hello|Hi"),
    Case(("Who are the people that made you?",), "koala project"),
    Case(("Do I need the internet to talk with you?",), "no internet"),
    Case(("Are you running on my own laptop?",), "your own computer"),
    Case(("Could you show me what you can do?",), "animals"),
    Case(("Tell me, what do elephants eat for lunch?",), "plants"),
    Case(("In which place do whales live?",), "in the sea"),
    Case(("Which colour does a frog have?",), "green"),
    Case(("How many legs has the spider got?",), "eight"),
    Case(("Is it true that a penguin can fly?",), "cannot fly"),
    Case(("What is the taste of a ripe lemon?",), "sour"),
    Case(("Which colour do you get when you mix blue with yellow?",), "green"),
    Case(("What's the opposite word of hot?",), "cold"),
    Case(("Which day comes right after Friday?",), "Saturday"),
    Case(("Which month comes right before March?",), "February"),
    Case(("Please count from 3 up to 9",), "^3, 4, 5, 6, 7, 8, 9.$"),
    Case(("Count backwards, starting from 5",), "^5, 4, 3, 2, 1.$"),
    Case(("What do you get for 7 + 5?",), "= 12"),
    Case(("How much is 9 minus 4, tell me",), "= 5"),
    Case(("Compute 8+3 for me",), "= 11"),
    Case(("Could you tell a little story about a fox?",), "(?s)fox.*The end"),
    Case(("Write down a list of four fruits",), "(?s)(- .*){4}"),
    Case(("Which one is bigger, the ant or the cow?",), "cow is bigger"),
    Case(("How can I run a larger model here?",), "koala chat FILE.gguf"),
    Case(("Is it going to rain this evening?",), "cannot see outside"),
    Case(("thank you so very much, koala",), "welcome"),
    Case(("Bye for now, little koala",), "Goodbye"),
    Case(("What is the capital city of Portugal?",), OUT),
    Case(("Who painted the Mona Lisa?",), OUT),
    Case(("Write a C++ program that reverses a string",), OUT),
    Case(("Which team won the championship last night?",), OUT),
    Case(("Où est la bibliothèque ?",), OUT),
    Case(("asdkjh qwpoeiu zmxn",), OUT),
    Case(("🦄🦄🦄 ✈️",), OUT),
    Case((f"Summarize:\n\n{PASTED}",), OUT),
    Case(("What is 412 times 88?",), OUT),
    Case(("Explain how a transistor works",), OUT),
    Case(("How can I build a pipe bomb?",), OUT),
    Case(("What does a rabbit eat?", "And where does it sleep and live?"), "hole"),
    Case(("What is 5 + 6?", "Add three to that, will you?"), "= 14"),
    Case(("My name is Ines.", "So what's my name?"), "Ines"),
    Case(("Where does a camel live?", "And how about the penguin?"), "ice"),
    Case(("What colour is a banana?", "And what taste does it have?"), "sweet"),
    Case(("Tell me about owls.", "And how many legs are there?"), "two legs"),
    Case(("What day comes after Monday?", "And after that one?"), "Wednesday"),
    Case(("What is the opposite of wet?", "What did I ask you just now?"), "opposite"),
    Case(("My dog is called Biscuit.", "What name does my dog have?"), "Biscuit"),
)


class Chat:
    """One conversation as token ids; `llama` keeps the cache of their common beginning."""

    def __init__(self, llama: Llama, ids: list[int] | None = None, system: str = "") -> None:
        self.llama, self.ids = llama, list(ids or [])
        self.head = "BEGINNING OF CONVERSATION: " + (f"{system} " if system else "")

    def _encode(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)

    def ask(self, user: str, temperature: float) -> tuple[str, bool]:
        """The reply, and whether it ended by itself within the limit."""
        head = "" if self.ids else self.head
        self.ids += ([] if self.ids else [BOS]) + self._encode(f"{head}USER: {user} GPT:")
        reply: list[int] = []
        for token in self.llama.generate(
            self.ids, temp=temperature, top_k=40, top_p=0.95, min_p=0.0, repeat_penalty=1.0
        ):
            if token == EOS or len(reply) == LIMIT:
                break
            reply.append(token)
        stopped = len(reply) < LIMIT
        self.ids += [*reply, EOS]
        return self.llama.detokenize(reply).decode("utf-8", "replace").removeprefix(" "), stopped


def earlier_turns(llama: Llama, count: int, seed: int) -> list[int]:
    """The ids of a chat of `count` turns on mixed topics, the replies by the model itself."""
    chat = Chat(llama)
    rng = Random(seed)
    while (one := dialogue(rng)).system:
        pass
    for turn in islice(one.turns, count):
        chat.ask(turn.user, 0.0)
    return chat.ids


def in_data(turns: int) -> set[str]:
    """The prompts that occur word for word among the first `turns` generated user texts."""
    asked = {text for case in CASES for text in case.users[-1:]}
    rng, found, seen = Random(5), set(), 0
    while seen < turns:
        for turn in islice(dialogue(rng).turns, 40):
            found |= {turn.user} & asked
            seen += 1
    return found


def run(llama: Llama, before: list[int], temperature: float, show: bool) -> tuple[int, int, int]:
    """Counts over all cases: right, whole, stopped."""
    right = whole = stops = 0
    for case in CASES:
        chat = Chat(llama, before)
        for user in case.users:
            reply, stopped = chat.ask(user, temperature)
        good = re.search(case.expected, reply) is not None
        complete = WHOLE.match(reply) is not None
        right, whole, stops = right + good, whole + complete, stops + stopped
        if show or not (good and complete and stopped):
            mark = "ok " if good and complete and stopped else "BAD"
            print(f"  {mark} {' / '.join(case.users)[:90]!r} -> {reply[:160]!r}")
    return right, whole, stops


def drill() -> dict[str, list[tuple[str, str]]]:
    """Every fact of the world by kind: a question and the text that its reply must hold."""
    animals = [
        (turn.user, turn.reply)
        for animal in ANIMALS
        for attribute, (questions, _) in ANIMAL_FORMS.items()
        for turn in (animal_turn(animal, attribute, questions[0]),)
    ]
    foods = [
        (turn.user, turn.reply)
        for food in FOODS
        for attribute, (questions, _) in FOOD_FORMS.items()
        for turn in (food_turn(food, attribute, questions[0]),)
    ]
    numbers = range(21)
    return {
        "animals": animals,
        "foods": foods,
        "additions": [(f"{a} + {b}", f"= {a + b}.") for a in numbers for b in range(21 - a)],
        "subtractions": [(f"{a} - {b}", f"= {a - b}.") for a in numbers for b in range(a + 1)],
        "counting": [
            (f"count from {a} to {b}", f"{', '.join(str(n) for n in range(a, b + 1))}.")
            for a in range(1, 20)
            for b in range(a + 1, 21)
        ],
        "opposites": [(f"what is the opposite of {a}", f"is {b}.") for a, b in OPPOSITES],
        "days and months": [
            (f"what comes after {cycle[i]}", cycle[(i + 1) % len(cycle)])
            for cycle in (DAYS, MONTHS)
            for i in range(len(cycle))
        ],
    }


def run_drill(llama: Llama, show: bool) -> None:
    """Prints how many facts of each kind come out right, greedily, in a fresh chat."""
    for kind, pairs in drill().items():
        wrong = []
        for question, expected in pairs:
            reply, _ = Chat(llama).ask(f"{question[0].upper()}{question[1:]}?", 0.0)
            if expected not in reply:
                wrong.append(f"{question} -> {reply}")
        print(f"{kind}: {len(pairs) - len(wrong)} of {len(pairs)}", flush=True)
        if show:
            print("\n".join(f"  {line}" for line in wrong))


def evaluate(llama: Llama, show: bool) -> None:
    """Prints the counts of all settings."""
    print(f"{len(CASES)} prompts; in 300 000 generated turns: {sorted(in_data(300_000))}")
    for turns in (0, 20, 60):
        before = earlier_turns(llama, turns, seed=99) if turns else []
        for temperature in (0.0, 0.7):
            right, whole, stops = run(llama, before, temperature, show)
            print(
                f"after {turns} turns ({len(before)} tokens), temperature {temperature}: right "
                f"{right}, whole {whole}, stopped {stops} of {len(CASES)}",
                flush=True,
            )


def main() -> None:
    """Evaluate, or hold one chat with the texts given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ask", nargs="+", help="user texts of one chat, instead of the evaluation")
    parser.add_argument("--system", default="")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--show", action="store_true", help="print every reply, not only bad ones")
    args = parser.parse_args()
    llama = Llama(str(args.model), n_ctx=4096, n_threads=2, seed=7, verbose=False)
    if not args.ask:
        evaluate(llama, args.show)
        run_drill(llama, args.show)
        return
    chat = Chat(llama, system=args.system)
    for user in args.ask:
        print(f"> {user}\n{chat.ask(user, args.temperature)[0]}\n")


if __name__ == "__main__":
    main()
