"""Measures GGUF models on dialogues of the generator that no model was trained on: how well they foresee a reply, and
whether the markers of helpful and unhelpful replies mean anything to them.

    python examples/nano/measure.py MODEL.gguf [ANOTHER.gguf ..]

Perplexity is for each token of a reply, its end included. Vocabularies differ, so models are compared in bits for each
byte of a reply's text.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
from llama_cpp import Llama

from koala_local.dialogue import BOS, KOALA, Control, Dialogue, Reply, Turn
from rows import conversation, pair
from talk import Turn as Said

SEED, DIALOGUES, PAIRS, LONGEST = 20_261_127, 200, 200, 12  # a seed that no row was made with; turns of a dialogue
Scored = tuple[float, int, int]  # nats, tokens and bytes of replies


def encode(model: Llama, dialogue: Dialogue) -> tuple[list[int], list[bool], int]:
    """The ids in Koala's format, which of them are a reply's, and the bytes of the replies."""
    ids: list[int] = []
    of_reply: list[bool] = []
    size, after_reply = 0, False
    for segment in KOALA.segments(dialogue):
        if isinstance(segment, Control):
            found = [model.token_bos() if segment == BOS else model.token_eos()]
        else:
            found = model.tokenize(segment.text.encode(), add_bos=False, special=False)
        size += len(segment.text.encode()) if isinstance(segment, Reply) else 0
        ids += found
        of_reply += [isinstance(segment, Reply) or after_reply] * len(found)
        after_reply = isinstance(segment, Reply)
    return ids, of_reply, size


def score(model: Llama, dialogue: Dialogue) -> Scored:
    """What the model makes of the replies."""
    ids, of_reply, size = encode(model, dialogue)
    model.reset()  # type: ignore[no-untyped-call]
    model.eval(ids)
    logits = np.asarray(model.scores[: len(ids) - 1], dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), ids[1:]]
    wanted = np.array(of_reply[1:])
    return float(losses[wanted].sum()), int(wanted.sum()), size


def total(scores: Iterable[Scored]) -> Scored:
    nats, tokens, size = zip(*scores, strict=True)
    return sum(nats), sum(tokens), sum(size)


def held_out(rng: Random) -> Dialogue:
    system, turns = conversation(rng, LONGEST)
    return Dialogue(tuple(Turn(turn.user, turn.reply) for turn in turns), system)


def marked(turns: Iterable[Said], helpful: bool) -> Dialogue:
    """The dialogue under one of the two markers."""
    return Dialogue(tuple(Turn(turn.user, turn.reply, helpful) for turn in turns))


def table(path: Path) -> str:
    """The figures of one model, as Markdown."""
    model = Llama(str(path), n_ctx=4096, logits_all=True, verbose=False)
    rng = Random(SEED)
    whole = total(score(model, held_out(rng)) for _ in range(DIALOGUES))
    lines = [
        f"## {path.name}\n",
        f"{DIALOGUES} dialogues: perplexity {math.exp(whole[0] / whole[1]):.3f} a token, "
        f"{whole[0] / math.log(2) / whole[2]:.4f} bits a byte\n",
        "| perplexity of | after `GPT:` | after `An Unhelpful Answer:` |\n|---|---|---|",
    ]
    both = [pair(rng) for _ in range(PAIRS)]
    for name, place in (("helpful replies", 0), ("unhelpful replies", 1)):
        cells = []
        for helpful in (True, False):
            nats, tokens, _ = total(score(model, marked(each[place], helpful)) for each in both)
            cells.append(f"{math.exp(nats / tokens):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write a table for each model to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    for path in parser.parse_args().models:
        sys.stdout.write(table(path) + "\n")


if __name__ == "__main__":
    main()
