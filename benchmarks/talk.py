"""A conversation straight on a ledger, with messages and replies of a given length."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from koala_local.chat.ledger import Exchange, Ledger, Overflow, Stats
from koala_local.dialogue import BOS, KOALA, Control, Dialogue, Reply, Text, Turn
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling

_QUESTIONS = (
    "what do cats eat",
    "where do whales live",
    "what colour is a frog",
    "can a penguin fly",
    "what day comes after friday",
    "what is the opposite of hot",
    "how many legs has a spider",
    "tell me a story about a fox",
    "count from 3 to 9",
    "what is 4 plus 5",
    "do you like music",
    "what is your name",
    "who made you",
    "what does a lemon taste like",
    "give me a list of fruits",
    "is it warm in summer",
)


def question(random: Random, parts: int = 1) -> str:
    """A message out of the bundled model's small world."""
    return " and ".join(random.sample(_QUESTIONS, parts)).capitalize() + "?"


def numbered(turn: int, sentences: int = 1) -> str:
    """A message of always the same length, different at every turn (below 100)."""
    return f"Number {turn:02d}: {' '.join(['Tell me what the old cat said to the dog.'] * sentences)}"


class Talk:
    """Turn after turn in Koala's format. Nothing is saved."""

    def __init__(self, engine: LlamaEngine, overflow: Overflow = "exact") -> None:
        self.ledger = Ledger(engine, KOALA, overflow)
        self.path: list[Exchange] = []
        self.dropped = 0

    def say(self, text: str, max_tokens: int = 0) -> Stats:
        """One more turn, its reply at most `max_tokens` long (0: until it ends)."""
        message = Exchange(Turn(text))
        sampling, seed = Sampling(max_tokens=max_tokens), len(self.path)
        answer = self.ledger.reply("", [*self.path, message], self.dropped, sampling, seed)
        self.path.append(Exchange(Turn(text, answer.text), answer.ids))
        self.dropped = answer.stats.dropped_turns
        return answer.stats

    def ask(self, text: str) -> Stats:
        """The first token of a reply, which is then forgotten."""
        held = list(self.ledger.cache.ids)
        answer = self.ledger.reply("", [*self.path, Exchange(Turn(text))], self.dropped, Sampling(max_tokens=1), 1)
        self.ledger.cache.adopt(held, hold=False)
        return answer.stats


def rendered(path: Sequence[Exchange], text: str) -> str:
    """The prompt for one more turn as a string, as a program that holds no ids must write it."""
    prompt = ""
    for segment in KOALA.segments(Dialogue((*(exchange.turn for exchange in path), Turn(text)))):
        match segment:
            case Control():
                prompt += "" if segment == BOS else "</s>"  # the `Llama` class puts BOS before every prompt
            case Text():
                prompt += segment.text
            case Reply():
                prompt += f" {segment.text}"
    return prompt
