"""Summarize from feedback: pairs of summaries of a post, of which people chose one."""

from __future__ import annotations

from random import Random
from typing import Any

from koala_local.dialogue import Dialogue, Turn

from .fields import field, has_keys, items, text
from .source import BadRow, Source

LEAD_INS = (
    "Summarize the following text: ",
    "Give me a short summary of this: ",
    "What is this post about, in a few words? ",
    "Put the following into one or two sentences: ",
    "Write a summary of the text below.\n\n",
    "Sum this up for me: ",
    "Shorten the following post to what matters: ",
    "What follows is too long. What is its gist?\n\n",
)


def dialogues(row: Any, random: Random) -> list[Dialogue]:
    """The chosen summary, and the other as an unhelpful one; each is asked for in its own words."""
    info = field(row, "info")
    post = info.get("post") if isinstance(info, dict) else None
    if post is None or post == "":
        raise BadRow("no post")
    post = text(info, "post")
    summaries, choice = items(row, "summaries"), field(row, "choice")
    if len(summaries) != 2 or type(choice) is not int or choice not in (0, 1):
        raise BadRow("not a choice between two summaries")
    return [_summary(post, summaries[choice], random, True), _summary(post, summaries[1 - choice], random, False)]


def _summary(post: str, summary: Any, random: Random, helpful: bool) -> Dialogue:
    return Dialogue((Turn(random.choice(LEAD_INS) + post, text(summary, "text").strip(), helpful),))


SUMMARIZATION = Source(
    key="summarization",
    title="Summarize from feedback",
    schema='lines of {"info": {"post"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}',
    licence="none stated",
    published=93_000,
    files=(),  # the hub's repository has a script that fetches them elsewhere
    repository="openai/summarize_from_feedback",
    fits=has_keys("info", "summaries", "choice"),
    dialogues=dialogues,
    converted=("comparisons/train/0000.parquet",),
)
