"""What is left out for its language or its words."""

from __future__ import annotations

import pytest
from koala_local.finetune.data.cleaning import english_probability, has_keyword, is_english
from koala_local.finetune.data.examples import texts

from koala_local.dialogue import Dialogue, Turn

WORDS = ("openai", "gpt-3", "open ai")


@pytest.mark.parametrize(
    "text",
    [
        "How do I boil an egg so that the yolk stays soft and the white is firm?",
        "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, i))\n\nprint('done with it')",
        "| 1 | 30 | 13 | 17 | 0.433 |\n| 2 | 40.1 | 75 | 27.1 | 60 |\n| 3 | 0.452 | 7 | 20.4 | 0.344 |",
        'Translate "the bread is warm and the butter is cold" into French.\nLe pain est chaud et le beurre est froid.',
        "HOW DO I BOIL AN EGG SO THAT THE YOLK STAYS SOFT?\nFive minutes.",
        "Bonjour, ça va?",  # too short to tell
        "",
    ],
)
def test_what_may_be_english_stays(text: str) -> None:
    assert is_english([text])


@pytest.mark.parametrize(
    "text",
    [
        "Wie koche ich ein Ei so, dass der Dotter weich bleibt und das Eiweiß fest wird?",
        "¿Cómo puedo cocer un huevo para que la yema quede blanda y la clara firme?",
        "Comment faire cuire un œuf pour que le jaune reste coulant et le blanc soit ferme ?",
        "Как сварить яйцо так, чтобы желток остался мягким, а белок стал твёрдым?",
        "请问怎样煮鸡蛋才能让蛋黄保持柔软而蛋白变硬呢？我每次都煮得太久了，请告诉我应该煮几分钟，谢谢你的帮助。",
    ],
)
def test_other_languages_leave(text: str) -> None:
    assert not is_english([text])
    assert english_probability(text) < 0.2


def test_all_texts_together_tell() -> None:
    """A short question in one word is judged by its long answer."""
    long = "Der Dotter bleibt weich, wenn das Ei nur fünf Minuten im kochenden Wasser liegt."
    assert is_english(["Ei?"]) and not is_english(["Ei?", long])
    assert is_english(["This is English, and it goes on for quite a while. " * 50, long])


@pytest.mark.parametrize("said", ["I am made by OpenAI.", "GPT-3 and its kin", "by Open AI, they say"])
def test_a_keyword_in_any_case_and_turn(said: str) -> None:
    dialogue = Dialogue((Turn("hello", "hi"), Turn("who are you?", said)))
    assert has_keyword(texts(dialogue), WORDS)
    assert not has_keyword(texts(Dialogue((Turn("hello", "open the aim"),))), WORDS)
    assert has_keyword(texts(Dialogue((Turn("a", "b"),), system=said)), WORDS)
    assert has_keyword(texts(f"A plain text. {said}"), WORDS) and not has_keyword(texts("open the aim"), WORDS)
