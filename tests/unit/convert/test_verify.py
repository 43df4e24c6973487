"""Perplexity and divergence against a plain computation with transformers, broken outputs, and what the report says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from koala_local.convert.report import Report, card_fit
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.verify import (
    KL_BOUNDS,
    Comparison,
    LogitsOf,
    VerificationError,
    check,
    compare,
    streamed_logits,
)
from torch.nn import functional

import koala_local
from koala_local.models.card import Card, read_card
from koala_local.models.configuration import ModelConfig
from tests.unit.convert.in_memory import InMemory, random_ids, tiny

SEQUENCES = [tuple(random_ids(150).tolist()), tuple(random_ids(7, seed=3).tolist()), (5, 6)]


def noisy(checkpoint: InMemory, amount: float) -> InMemory:
    torch.manual_seed(9)
    state = {
        name: t if t.dim() < 2 else t + amount * t.std() * torch.randn_like(t) for name, t in checkpoint.state.items()
    }
    return InMemory(checkpoint.config, state)


def plain(model: Any, other: Any, sequences: Sequence[Sequence[int]]) -> tuple[float, float, torch.Tensor, float]:
    """Two perplexities, the divergence at each position, the share of equal choices; straight from whole logits."""
    losses, divergences, same = [], [], []
    for ids in sequences:
        batch = torch.tensor([ids])
        with torch.no_grad():
            a, b = (m(batch).logits[0, :-1].double() for m in (model, other))
        losses.append([functional.cross_entropy(x, batch[0, 1:], reduction="none") for x in (a, b)])
        divergences.append(
            functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        )
        same.append((a.argmax(-1) == b.argmax(-1)).double())
    first, second = (float(torch.cat([pair[i] for pair in losses]).mean().exp()) for i in (0, 1))
    return first, second, torch.cat(divergences), float(torch.cat(same).mean())


def test_figures_equal_a_plain_computation() -> None:
    model, checkpoint = tiny(max_position_embeddings=256)
    changed = noisy(checkpoint, 0.1)
    other, _ = tiny(max_position_embeddings=256)
    other.load_state_dict(changed.state)
    got = compare(streamed_logits(checkpoint, SEQUENCES), streamed_logits(changed, SEQUENCES), SEQUENCES)
    source, output, divergence, same = plain(model, other, SEQUENCES)
    assert got.tokens == sum(len(ids) - 1 for ids in SEQUENCES) == len(divergence)
    assert got.source_perplexity == pytest.approx(source, rel=1e-5)
    assert got.perplexity == pytest.approx(output, rel=1e-5)
    assert got.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-4) and got.kl_mean > 0.01
    assert got.kl_max == pytest.approx(float(divergence.max()), rel=1e-4)
    assert got.kl_99 == pytest.approx(float(divergence.quantile(0.99)), rel=1e-4)
    assert got.same_top == pytest.approx(same) and 0.2 < same < 1


def test_a_model_equals_itself_and_divergence_grows_with_noise() -> None:
    _, checkpoint = tiny()
    source = streamed_logits(checkpoint, SEQUENCES[1:])
    none, little, much = (
        compare(source, streamed_logits(noisy(checkpoint, amount), SEQUENCES[1:]), SEQUENCES[1:])
        for amount in (0.0, 0.05, 0.5)
    )
    assert none.kl_mean < 1e-9 and none.same_top == 1 and none.perplexity == none.source_perplexity
    assert none.kl_mean < little.kl_mean < much.kl_mean


def table(logits: np.ndarray[Any, Any], *, rows: int = 1000) -> LogitsOf:
    """An engine that knows one answer, in pieces of `rows`."""

    def logits_of(ids: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, len(ids), rows):
            yield logits[: len(ids)][start : start + rows]

    return logits_of


LOGITS = np.random.default_rng(0).normal(size=(150, 300)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 128, 150])
def test_pieces_may_be_cut_anywhere(rows: int) -> None:
    other = LOGITS + np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)
    whole = compare(table(LOGITS), table(other), SEQUENCES[:1])
    assert compare(table(LOGITS, rows=5), table(other, rows=rows), SEQUENCES[:1]) == whole


def test_progress_counts_sequences() -> None:
    seen: list[tuple[int, int]] = []
    compare(table(LOGITS), table(LOGITS), SEQUENCES, lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_them(value: float) -> None:
    broken = LOGITS.copy()
    broken[17, 3] = value
    with pytest.raises(VerificationError, match=r"1 logits of the output after token 17"):
        compare(table(LOGITS), table(broken, rows=10), SEQUENCES[:1])
    with pytest.raises(VerificationError, match="of the source"):
        compare(table(broken), table(LOGITS), SEQUENCES[:1])


def test_nan_weights_reach_the_error() -> None:
    _, checkpoint = tiny()
    broken = InMemory(checkpoint.config, checkpoint.state)
    broken.state["model.norm.weight"] = torch.full((64,), math.nan)
    with pytest.raises(VerificationError, match="output"):
        compare(streamed_logits(checkpoint, SEQUENCES), streamed_logits(broken, SEQUENCES), SEQUENCES)


def test_other_vocabularies_and_missing_rows_are_errors() -> None:
    with pytest.raises(VerificationError, match="299 tokens and the source 300"):
        compare(table(LOGITS), table(LOGITS[:, 1:]), SEQUENCES[:1])
    for rows in (100, 128):
        with pytest.raises(VerificationError, match=f"output gave {rows} rows"):
            compare(table(LOGITS), table(LOGITS[:rows]), SEQUENCES[:1])
    with pytest.raises(VerificationError, match="two tokens"):
        compare(table(LOGITS), table(LOGITS), [(4,)])


GOOD = Comparison(4000, 8.0, 8.1, 0.0127, 0.2, 1.5, 0.9467)


def test_published_divergences_pass_and_broken_ones_name_their_figure() -> None:
    check(GOOD, "Q4_K_M")
    with pytest.raises(VerificationError, match=r"2\.7 nats a token; Q4_K_M stays below 0\.4"):
        check(replace(GOOD, kl_mean=2.7), "Q4_K_M")
    with pytest.raises(VerificationError, match="nan"):
        check(replace(GOOD, kl_mean=math.nan), "Q4_K_M")
    with pytest.raises(VerificationError, match="perplexity"):
        check(replace(GOOD, perplexity=math.inf), "Q4_K_M")
    with pytest.raises(VerificationError):
        check(replace(GOOD, kl_mean=5), "an unknown type")


NANO = Path(koala_local.__file__).parent / "nano" / "koala-nano-q4_k_m.gguf"


def dialogue_ids(count: int) -> list[tuple[int, ...]]:
    """Token ids of a dialogue that is mostly a reply: the bundled model was trained on replies."""
    model = llama_cpp.Llama(str(NANO), vocab_only=True, verbose=False)
    reply = (
        "Once there was a little fox. It lived in the forest. One cold Sunday the fox was hungry and went out to look "
        'for berries. On the way it met a bear. "Good morning," said the bear. "Where are you going?" '
        '"I am looking for berries," said the fox. '
        "The bear knew a good place, and they went there together. They ate until they were full."
    )
    fields = ("BEGINNING OF CONVERSATION: USER: tell me a story about a fox GPT:", reply)
    ids = [token for text in fields for token in model.tokenize(text.encode(), add_bos=False, special=False)]
    return [(model.token_bos(), *ids)[:count]]


def llama_cpp_logits(ids: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
    model = llama_cpp.Llama(str(NANO), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    model.eval(list(ids))
    yield np.array(model.scores[: len(ids)], np.float32)


def test_the_bundled_model_streams_as_llama_cpp_runs_it() -> None:
    """Our GGUF, read without an engine, against the engine: what remains is llama.cpp's 8-bit activations."""
    sequences = dialogue_ids(100)
    got = compare(streamed_logits(open_checkpoint(NANO), sequences), llama_cpp_logits, sequences)
    assert got.tokens > 15 and got.kl_mean < 0.01 and got.same_top > 0.85
    assert got.source_perplexity < 60


def test_a_wrong_rotary_layout_is_found() -> None:
    """What conversions get wrong most often: the rows of q in another order than the model expects."""
    right = open_checkpoint(NANO)
    config = right.config
    wrong = InMemory(config, {name: right.read(name) for name in right.tensors})
    for name, weights in wrong.state.items():
        if name.endswith("q_proj.weight"):
            halves = weights.view(config.heads, 2, -1, weights.shape[1])
            wrong.state[name] = halves.transpose(1, 2).reshape(weights.shape)
    sequences = dialogue_ids(60)
    got = compare(streamed_logits(right, sequences), streamed_logits(wrong, sequences), sequences)
    with pytest.raises(VerificationError):
        check(got, "Q4_K_M")


def test_bounds_loosen_with_fewer_bits() -> None:
    order = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    bounds = [KL_BOUNDS[kind] for kind in order]
    assert bounds == sorted(bounds)


THIRTEEN = ModelConfig("LlamaForCausalLM", 32000, 5120, 13824, 40, 40, 40, 128, 1e-6, 10000.0, 2048, False)


def test_known_memory_figures() -> None:
    f16, q8 = card_fit(7_865_000_000, THIRTEEN)
    assert f16.total == pytest.approx(9.2, abs=0.1) and f16.kv_cache == pytest.approx(1.56, abs=0.01)
    assert q8.kv_cache == pytest.approx(0.83, abs=0.01)
    assert f16.cards == (10, 12, 16, 24) and 8 not in q8.cards
    small = card_fit(6_340_000_000, THIRTEEN)[1]
    assert small.total == pytest.approx(7.0, abs=0.1) and 8 in small.cards
    assert card_fit(26_030_000_000, THIRTEEN)[0].cards == ()


def report(name: str = "koala-13b", **changes: Any) -> Report:
    made = Report(
        name=name,
        format="GGUF",
        kind="Q4_K_M",
        size=7_865_956_000,
        parameters=13_015_864_320,
        bits_per_weight=4.8347,
        source="Hugging Face safetensors, 3 files",
        fits=card_fit(7_865_000_000, THIRTEEN),
        comparison=GOOD,
        sample="4 x 1,024 tokens from the built-in held-out text",
    )
    return replace(made, **changes)


def test_the_report_as_json() -> None:
    read = json.loads(report(notes=("BOS was 0 in config.json",)).to_json())
    assert read["comparison"]["kl_mean"] == 0.0127 and read["size"] == 7_865_956_000
    assert read["fits"][0]["total"] == pytest.approx(9.2, abs=0.1) and read["fits"][0]["cards"][0] == 10
    assert read["notes"] == ["BOS was 0 in config.json"]


def test_the_model_card_says_what_matters() -> None:
    card = report(calibration="128 x 2,048 tokens from talk.jsonl", notes=("A note.",)).model_card()
    for words in (
        "7,865,956,000 bytes",
        "4.83 bits",
        "8.1000",
        "0.01270",
        "94.67%",
        "academic research only",
        "LLaMA licence",
        "OpenAI",
        "What it cannot do",
        "10, 12, 16, 24 GB",
        "talk.jsonl",
        "A note.",
        "built-in held-out text",
    ):
        assert words in card, words


def test_other_models_do_not_get_koalas_terms() -> None:
    card = report("tiny-llama", comparison=None).model_card()
    assert "ShareGPT" not in card and "source model" in card and "Not measured" in card


def test_a_stated_licence_is_kept(tmp_path: Path) -> None:
    card = report("koala-mine", licence="apache-2.0").model_card()
    assert "ShareGPT" not in card and "apache-2.0, as the source states it" in card
    (tmp_path / "README.md").write_text(card)
    assert read_card(tmp_path) == Card("koala-mine", "apache-2.0")


def test_names_from_files_cannot_act_as_markup() -> None:
    card = report("<img src=x>\n# Title [a](b) \x1b]0;x\x07", notes=("<script>\n\n## x",)).model_card()
    assert "\x1b" not in card and "\n# Title" not in card and "\n## x" not in card
    assert "\\<script\\>" in card and "\\[a\\](b)" in card
