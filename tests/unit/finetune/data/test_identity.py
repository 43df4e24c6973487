"""What the model learns to say of itself is varied, honest, and as much as the original had."""

from __future__ import annotations

import re

import pytest
from koala_local.finetune.data.download import packaged
from koala_local.finetune.data.examples import Example
from koala_local.finetune.data.sources import IDENTITY, read_source

from koala_local.dialogue import Dialogue


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    found = list(read_source(IDENTITY, packaged(), seed=1))
    dialogues = [each.content for each in found if isinstance(each, Example) and isinstance(each.content, Dialogue)]
    assert len(dialogues) == len(found) and all(len(dialogue.turns) == 1 for dialogue in dialogues)
    turns = [dialogue.turns[0] for dialogue in dialogues]
    assert all(turn.helpful for turn in turns)
    return [(turn.user, turn.reply or "") for turn in turns]


def test_there_are_850_different_pairs(pairs: list[tuple[str, str]]) -> None:
    assert len(pairs) == len(set(pairs)) == 850
    assert len({question for question, _ in pairs}) > 120
    assert len({answer for _, answer in pairs}) > 60


def test_no_answer_claims_another_maker(pairs: list[tuple[str, str]]) -> None:
    others = re.compile(r"openai|google|microsoft|anthropic|amazon|apple|ibm|gpt-|bard|gemini|claude|siri|alexa", re.I)
    claims = re.compile(r"\bI(?:'m| am) (?:ChatGPT|LLaMA|Alpaca|Vicuna|an? assistant (?:by|from))", re.I)
    for _, answer in pairs:
        assert not others.search(answer) and not claims.search(answer), answer


def test_questions_after_another_model_or_maker_are_denied(pairs: list[tuple[str, str]]) -> None:
    asked = re.compile(r"(?:Are you|Am I talking to|You are) (?:ChatGPT|GPT|Bing|Bard|Claude|Siri)[^?]*\?|OpenAI\?")
    found = [(question, answer) for question, answer in pairs if asked.match(question) or "by OpenAI?" in question]
    denied = re.compile(r"No\b|I am not|I do not come|I'm Koala|I am Koala")
    assert len(found) > 100 and all(denied.match(answer) for _, answer in found)


def test_texts_are_whole(pairs: list[tuple[str, str]]) -> None:
    for question, answer in pairs:
        assert question == question.strip() and "{" not in question + answer
        assert answer == answer.strip() and answer.endswith((".", "?")) and 20 < len(answer) < 300
