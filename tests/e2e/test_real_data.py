"""Raw files as they were published -> a corpus -> a trained LLaMA that transformers loads, by the installed program."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from koala_local.finetune.data.corpus import open_corpus
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.test_road import koala
from tests.finetune_runs import losses

DATA = Path(os.environ.get("KOALA_TEST_DATA", "/nonexistent"))
RAW = {"sharegpt": "sharegpt_sample.json.xz", "hh": "hh_harmless_base_test.jsonl.gz"}
RECIPE = """
[sources.sharegpt]
english = true
duplicates = "near"
[sources.hh]
"""
PIECES, STEPS = 32_000, 30
RUN = (
    "sequence_length=256", "global_batch=4", "micro_batch=4", f"max_steps={STEPS}", "learning_rate=1e-2",
    "warmup_steps=5", "recompute=none", "dropout=0",
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An untrained LLaMA with the real tokenizer."""
    config = LlamaConfig(
        vocab_size=PIECES, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    shutil.copyfile(DATA / "models" / "llama_tokenizer.model", tmp_path / "llama" / "tokenizer.model")
    return tmp_path / "llama"


@pytest.mark.skipif(not (DATA / "dialogue").is_dir(), reason="KOALA_TEST_DATA names no folder of real data")
def test_raw_files_become_a_model_that_has_learned(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    raw, corpus, out = tmp_path / "raw", tmp_path / "corpus", tmp_path / "koala-tiny"
    for source, name in RAW.items():
        (raw / source).mkdir(parents=True)
        os.symlink(DATA / "dialogue" / name, raw / source / name)
    os.symlink(DATA / "eval", raw / "eval")
    (tmp_path / "mine.toml").write_text(RECIPE)
    told = koala("data", "build", tmp_path / "mine.toml", "--raw", raw, "--tokenizer", base, "-o", corpus)
    assert "Held against the test sets" in told and "NOT DECONTAMINATED" not in told
    koala("finetune", "--base", base, "--data", corpus, "-o", out, "--gpus", "0", *RUN)
    curve = losses(out)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[1] == pytest.approx(math.log(PIECES), abs=0.2)
    assert fmean(list(curve.values())[-5:]) < curve[1] - 2
    before, after = (LlamaForCausalLM.from_pretrained(folder) for folder in (base, out))
    assert mean_loss(after, corpus) < mean_loss(before, corpus) - 2


def mean_loss(model: LlamaForCausalLM, folder: Path) -> float:
    """Of the dialogues held out, on what would be trained, as transformers computes it."""
    corpus = open_corpus(folder)
    sums, count = 0.0, 0
    for index in corpus.held_out.nonzero()[0].tolist():
        ids, trained = (torch.from_numpy(part[:256].astype("int64")) for part in corpus.document(index))
        labels = ids.masked_fill(trained == 0, -100)
        targets = int((labels[1:] >= 0).sum())
        if targets:
            with torch.no_grad():
                sums += float(model(ids[None], labels=labels[None]).loss) * targets
            count += targets
    return sums / count
