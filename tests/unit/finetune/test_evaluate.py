"""Held-out perplexity and samples: exact, the same on every rank, and without a trace in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from koala_local.finetune.data.packing import Batch
from koala_local.finetune.data.tokens import DialogueTokenizer
from koala_local.finetune.evaluate import Evaluation, HeldOutLoss, evaluate
from koala_local.finetune.launch import Rank
from koala_local.finetune.model import Trainee
from koala_local.finetune.settings import Settings
from koala_local.finetune.train import train

from koala_local.dialogue import Dialogue, Turn
from tests.checkpoint_maker import tokenizer_model
from tests.unit.finetune.tiny import CPU, SHAPE, alone, batch, by_transformers, trainee
from tests.unit.finetune.toy import SETTINGS, ToyPlan, TwoRanks, make_run, weights_of


@dataclass(frozen=True)
class Rows:
    """The rows of one batch, as a pack plan's. Every trained token weighs 1."""

    whole: Batch

    @property
    def rows(self) -> int:
        return len(self.whole.ids)

    def batch(self, rows: Sequence[int], loss_norm: Any = "token") -> Batch:
        chosen = list(rows)
        w = self.whole
        return Batch(w.ids[chosen], w.targets[chosen], w.weights[chosen], w.positions[chosen], w.documents[chosen])


def held_out() -> Rows:
    made = batch([[30, 20], [64], [10, 11, 12], [50], [5, 5]])
    return Rows(replace(made, weights=(made.weights > 0).astype(np.float32)))


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_perplexity_is_the_exponential_of_the_exact_mean(micro_batch: int) -> None:
    model = trainee(Settings(model=SHAPE, sequence_length=64, dropout=0.3, recompute="none", master_dtype="float64"))
    rows: Any = held_out()
    found = evaluate(model, {"own": rows}, micro_batch=micro_batch, rank=Rank(), device=CPU).losses["own"]
    total, _ = by_transformers(model, *alone(rows.whole))
    count = int((rows.whole.weights > 0).sum())
    assert found.tokens == count
    assert found.total == pytest.approx(total, rel=1e-10)  # norms and rotation are float32 in both
    assert found.perplexity == pytest.approx(math.exp(total / count))
    assert model.training


def test_all_is_weighted_by_tokens_and_what_is_no_number_is_null() -> None:
    found = Evaluation({"a": HeldOutLoss(30.0, 10), "b": HeldOutLoss(10.0, 30), "c": HeldOutLoss(math.inf, 1)})
    values = found.values()
    assert values["perplexity"] == {"a": math.exp(3), "b": math.exp(1 / 3), "c": None, "all": None}
    both = Evaluation({"a": HeldOutLoss(30.0, 10), "b": HeldOutLoss(10.0, 30)}).overall
    assert (both.mean, both.tokens) == (1.0, 40)
    assert Evaluation({}).values()["perplexity"] == {}


def test_training_after_an_evaluation_is_bit_identical(tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=4, dropout=0.1, attention_dropout=0.1, eval_every=2)
    plain, _ = make_run(tmp_path / "plain", settings)
    evaluated, _ = make_run(tmp_path / "evaluated", settings)
    held: Any = Rows(ToyPlan().batch(np.arange(5)))
    seen: list[tuple[float, bool]] = []

    def look(_: int) -> None:
        state = torch.get_rng_state()
        found = evaluate(evaluated.trainee, {"toy": held}, micro_batch=2, rank=Rank(), device=CPU)
        seen.append((found.overall.mean, torch.equal(state, torch.get_rng_state())))

    evaluated.evaluate = look
    train(plain)
    train(evaluated)
    assert len(seen) == 2 and all(same for _, same in seen)
    one, other = weights_of(plain), weights_of(evaluated)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> DialogueTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_model())
    return DialogueTokenizer(path)


def test_samples_are_greedy(tokenizer: DialogueTokenizer) -> None:
    """As transformers' own generate, prompts of different lengths in one batch."""
    from koala_local.finetune.model import build, shape_config
    from transformers import LlamaConfig, LlamaForCausalLM

    config = shape_config(SHAPE, tokenizer.size)
    model = build(config, None, Settings(model=SHAPE, dropout=0.5), device=CPU, mesh=None)
    prompts = ("One", "The river runs to the sea", "")
    found = evaluate(
        model, {}, micro_batch=1, rank=Rank(), device=CPU, tokenizer=tokenizer, prompts=prompts, sample_tokens=12
    )
    again: Any = LlamaConfig.from_dict({**config.to_dict(), "attn_implementation": None})
    other: Any = LlamaForCausalLM(again)
    weights = {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in model.model.state_dict().items()}
    other.load_state_dict(weights)
    for sample in found.samples:
        ids = list(tokenizer.encode(Dialogue((Turn(sample.prompt),))).ids)
        done = (
            other.eval()
            .generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos, pad_token_id=0
            )[0]
            .tolist()[len(ids) :]
        )
        text = b"".join(tokenizer.piece(token) for token in done).decode("utf-8", "replace").strip()
        assert (sample.reply, sample.finished) == (text, done[-1] == tokenizer.eos)


class Parrot(torch.nn.Module):
    """Says the same tokens whatever it is asked."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        super().__init__()
        self.tokens, self.size, self.asked = list(tokens), size, 0
        self.config = type("Config", (), {"max_position_embeddings": 64})

    def forward(self, _: Any, logits_at: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(logits_at), self.size)
        logits[:, self.tokens[self.asked]] = 1.0
        self.asked += 1
        return logits


def test_a_reply_ends_at_its_end_token_or_at_the_limit(tokenizer: DialogueTokenizer) -> None:
    word = tokenizer.encode(Dialogue((Turn("x", "One two"),))).ids[-3:-1]
    options: Any = {"micro_batch": 1, "rank": Rank(), "device": CPU, "tokenizer": tokenizer, "prompts": ("a", "bb")}
    ending: Any = Parrot([*word, tokenizer.eos], tokenizer.size)
    found = evaluate(ending, {}, **options)
    assert ending.asked == 3
    assert [sample.finished for sample in found.samples] == [True, True]
    text = b"".join(map(tokenizer.piece, word)).decode().strip()
    assert found.samples[0].reply == text
    endless: Any = Parrot([word[0]] * 100, tokenizer.size)
    (cut, _) = evaluate(endless, {}, **options, sample_tokens=5).samples
    assert (endless.asked, cut.finished) == (5, False)


def _on_two_ranks() -> tuple[dict[str, Any], list[float]]:
    import torch.distributed as dist
    from koala_local.finetune.model import build, shape_config
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    rank = Rank(dist.get_rank(), 2, dist.get_rank())
    settings = Settings(model=SHAPE, sequence_length=64, dropout=0.3, recompute="full")
    model: Trainee = build(shape_config(SHAPE, 61), None, settings, device=CPU, mesh=init_device_mesh("cpu", (2,)))
    rows: Any = held_out()
    found = evaluate(model, {"own": rows}, micro_batch=1, rank=rank, device=CPU)
    state: dict[str, Any] = get_model_state_dict(model)  # fails on a model that was left whole
    return found.values(), [float(each.full_tensor().double().sum()) for each in state.values()]


def test_two_ranks_share_the_rows_and_agree(ranks: TwoRanks) -> None:
    (one, sums), (other, _) = ranks.run(_on_two_ranks)
    model = trainee(Settings(model=SHAPE, sequence_length=64, dropout=0.3, recompute="none"))
    rows: Any = held_out()
    alone_ = evaluate(model, {"own": rows}, micro_batch=2, rank=Rank(), device=CPU).values()
    assert one == other
    assert one["perplexity"]["own"] == pytest.approx(alone_["perplexity"]["own"], rel=1e-6)
    assert one["held_out_tokens"] == alone_["held_out_tokens"]
    assert len(sums) == len(list(model.parameters()))
