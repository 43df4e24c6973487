"""The card says what the run saw, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from koala_local.finetune.data.corpus import Counts, Manifest
from koala_local.finetune.data.packing import Share
from koala_local.finetune.model_card import Training, model_card
from koala_local.finetune.settings import LoraSettings, Settings
from koala_local.finetune.throughput import Numbers

STEPS = [
    {"step": n, "loss": 4.0 - n / 10, "tokens": 1000, "tokens_per_s": 500.0, "learning_rate": 1e-3, "grad_norm": 1.0}
    for n in range(1, 21)
]
EVALUATIONS: list[dict[str, Any]] = [
    {"event": "evaluation", "step": 10, "perplexity": {"hc3": 40.0}, "held_out_tokens": {"hc3": 900}},
    {
        "event": "evaluation",
        "step": 20,
        "perplexity": {"hc3": 20.5},
        "held_out_tokens": {"hc3": 900},
        "samples": [{"prompt": "Hello!", "reply": "# Hi\n<b>there</b>", "finished": False}],
    },
]


def run(**changes: Any) -> Training:
    counts = {"hc3": Counts(1200, 12, 34_000, 20_000), "mine": Counts(5, 0, 400, 100)}
    manifest = Manifest("key", 100, "koala", {}, {"name": "koala-distill"}, counts, {}, "ab" * 32)
    shares = {"hc3": Share(2376, 68_000, 40_000), "mine": Share(10, 800, 200)}
    plan: Any = SimpleNamespace(
        sources=shares,
        rows=35,
        fill=0.98,
        tokens=68_800,
        trained_tokens=40_200,
        sequence_length=2048,
        key="cd" * 32,
        cuts="3 dialogues longer than a row, between turns",
    )
    told: dict[str, Any] = {
        "name": "my-koala",
        "base": "llama-7b",
        "base_licence": None,
        "numbers": Numbers(32_000, 4096, 11_008, 32, 32, 32, 128),
        "settings": Settings(learning_rate=3e-5),
        "manifest": manifest,
        "plan": plan,
        "log": [*STEPS, *EVALUATIONS],
        "dtype": "bfloat16",
        "version": "1.2.3",
    }
    return Training(**{**told, **changes})


def test_it_tells_the_data_the_settings_and_what_was_measured() -> None:
    card = model_card(run())
    assert card.startswith("---\n") and "\n# my-koala\n" in card
    for part in (
        "| hc3 | 1,200 | 12 | 2,376 | 68,000 | 40,000 | cc-by-sa-4.0 |",
        "| mine | 5 | 0 | 10 | 800 | 200 | the user's own; not known here |",
        "Recipe `koala-distill`",
        "35 rows of 2,048 tokens, 98.0% full; 68,800 tokens, 40,200 of them trained on. Cut, per epoch: 3 dialogues",
        '"learning_rate": 3e-05',
        "20 steps, 20,000 tokens, on 1 processor rank; 40 s in steps",
        "3.4500 over the first 10 steps, 2.4500 over the last 10",
        "| hc3 | 40.000 | 20.500 | 900 |",
        "6,738,415,616 parameters, stored as bfloat16",
        "![Curves of the run](curves.png)",
        "koala 1.2.3",
        "its licence is not known here",
        "saw 2048 tokens at a time",
        "- cc-by-sa-4.0: hc3.",
    ):
        assert part in card, part


def test_replies_are_shown_as_code_and_names_cannot_write_markdown() -> None:
    card = model_card(run(base="<script>x|y"))
    assert "    GPT: # Hi\n    <b>there</b> [cut]\n" in card
    assert "\n# Hi" not in card and "\n<b>" not in card
    assert "<script>" not in card.replace("\\<script\\>", "")


def test_what_was_not_measured_is_not_claimed() -> None:
    card = model_card(run(log=STEPS[:3]))
    assert "no perplexity was measured" in card
    assert "Greedy replies" not in card
    assert "by source" not in card
    assert "Training loss" not in model_card(run(log=[]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": None}, "A LLaMA trained from scratch on dialogues"),
        (
            {"settings": Settings(lora=LoraSettings(rank=8))},
            "by LoRA of rank 8 and alpha 16 on every linear",
        ),
        (
            {"settings": Settings(lora=LoraSettings(four_bit=True))},
            "by QLoRA, over weights of 4 bits (NF4)",
        ),
        ({"settings": Settings(lora=LoraSettings(rank=8))}, "layer of the blocks: 19,988,480 weights were trained"),
        ({"base": "owner/model"}, "\nbase_model: owner/model\n"),
        ({"base_licence": "apache-2.0"}, "- Base llama-7b: apache-2.0."),
        ({"gpu": "NVIDIA A100", "ranks": 8}, "on 8 x NVIDIA A100"),
    ],
)
def test_it_tells_how_it_was_made(changes: dict[str, Any], said: str) -> None:
    assert said in model_card(run(**changes))


def test_an_infinite_perplexity_is_a_dash() -> None:
    broken = {**EVALUATIONS[1], "perplexity": {"hc3": None}}
    assert "| hc3 | 40.000 | - | 900 |" in model_card(replace(run(), log=[*STEPS, EVALUATIONS[0], broken]))
