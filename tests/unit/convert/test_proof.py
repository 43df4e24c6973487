"""A written file in its own engine, against its source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from koala_local.convert.calibration import Tokenizer
from koala_local.convert.gguf.write import write_gguf
from koala_local.convert.proof import _held_sample, prove
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.verify import VerificationError
from koala_local.convert.vocabulary.read import read_vocabulary

from koala_local.models.configuration import ModelConfig
from tests.checkpoint_maker import make_hf

BILLION = ModelConfig("LlamaForCausalLM", 32000, 2048, 5632, 22, 32, 4, 64, 1e-6, 10000.0, 2048, False)


def test_a_vocabulary_that_tokenizes_otherwise_is_an_error(tmp_path: Path) -> None:
    """Two letters with each other's rows: what the source's ids are fed to is the source all the same."""
    folder, out = make_hf(tmp_path / "model", layers=1), tmp_path / "out.gguf"
    checkpoint = open_checkpoint(folder)
    vocabulary = read_vocabulary(folder, checkpoint.config)
    write_gguf(checkpoint, vocabulary, out, "F16", threads=1)
    assert prove(checkpoint, folder, folder, out, "F16")[0].kl_mean < 0.02
    tokens = list(vocabulary.tokens)
    a, e = tokens.index(b"a"), tokens.index(b"e")
    tokens[a], tokens[e] = tokens[e], tokens[a]
    write_gguf(checkpoint, replace(vocabulary, tokens=tokens), out, "F16", threads=1, force=True)
    with pytest.raises(VerificationError, match="tokenizes a text in another way"):
        prove(checkpoint, folder, folder, out, "F16")


def test_a_window_is_not_looked_beyond(tmp_path: Path) -> None:
    """llama.cpp attends to all there is: only as far as the window reaches is the source to be compared with."""
    folder, out = make_hf(tmp_path / "model", layers=2), tmp_path / "out.gguf"
    settings = json.loads((folder / "config.json").read_text())
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32}
    (folder / "config.json").write_text(json.dumps(settings | mistral))
    checkpoint = open_checkpoint(folder)
    write_gguf(checkpoint, read_vocabulary(folder, checkpoint.config), out, "F32", threads=1)
    comparison, sample = prove(checkpoint, folder, folder, out, "F32")
    assert " x 32 tokens" in sample
    assert comparison.kl_max < 1e-4


def test_both_passes_fit_the_time_that_is_stated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1.1 billion weights at 0.1 TFLOP a second: 10 s a sequence and pass, and 15 s to unpack them for GPTQ."""
    monkeypatch.setattr("koala_local.convert.estimate._flops_per_second", lambda _: 1e11)
    letters = Tokenizer(lambda text: [ord(c) for c in text])
    samples = [_held_sample(BILLION, letters, unpacked=count) for count in (0, 970_000_000)]
    assert [len(sample.sequences) for sample in samples] == [8, 4]
    stated = [line.split(", about ")[1].split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert stated == ["2.9 min", "2.5 min"]
