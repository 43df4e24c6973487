"""Whole checkpoints through GPTQ: what is written, how a stopped run goes on, what a trained model loses."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from koala_local.convert.calibration import builtin_calibration, builtin_held_out
from koala_local.convert.forward import LINEAR, Head, Observe, stream_layers
from koala_local.convert.gptq.checkpoint import GptqResult, quantize_gptq
from koala_local.convert.gptq.matrix import GptqSettings, Hessian, quantize_matrix
from koala_local.convert.gptq.pack import PARTS, unpack
from koala_local.convert.sources.architecture import Checkpoint
from koala_local.convert.sources.checkpoint import open_checkpoint
from safetensors.torch import load_file
from torch.nn import functional

from koala_local.engine.gptq import load_gptq
from koala_local.errors import KoalaError, ModelFileError
from tests.checkpoint_maker import make_hf, tokenizer_model
from tests.unit.convert.in_memory import InMemory, random_ids, tiny
from tests.unit.convert.rounding import nearest

SMALL = GptqSettings(bits=4, group_size=32)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "weights.bin").write_bytes(b"not a tokenizer's file")
    return folder


def run(
    checkpoint: InMemory, out: Path, tokenizer: Path, settings: GptqSettings = SMALL, **options: object
) -> GptqResult:
    batches = [random_ids(1, 48, seed=seed) for seed in range(6)]
    return quantize_gptq(checkpoint, batches, out, settings, tokenizer_folder=tokenizer, **options)  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def dequantized(folder: Path, source: InMemory, bits: int) -> InMemory:
    """The written model as a checkpoint in float32."""
    stored, state = written(folder), dict[str, torch.Tensor]()
    for name in source.state:
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" in stored:
            state[name] = unpack({part: stored[f"{stem}.{part}"] for part in PARTS}, bits).dequantized()
        else:
            state[name] = stored[name].float()
    return InMemory(source.config, state)


def test_the_folder_is_a_gptq_checkpoint(tmp_path: Path, tokenizer: Path) -> None:
    _, checkpoint = tiny(num_key_value_heads=2, vocab_size=340)
    seen: list[tuple[str, int, int]] = []
    result = run(checkpoint, tmp_path / "out", tokenizer, progress=lambda *step: seen.append(step))
    assert result.folder == tmp_path / "out"
    assert [step[1:] for step in seen] == [(done + 1, 14) for done in range(14)]
    assert seen[0][0] == "model.layers.0.self_attn.q_proj"
    config = json.loads((result.folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization.pop("meta")["quantizer"][0].startswith("koala-local:")
    assert quantization == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
    assert json.loads((result.folder / "quantize_config.json").read_text())["bits"] == 4
    assert (config["architectures"], config["torch_dtype"]) == (["LlamaForCausalLM"], "float16")
    files = {path.name for path in result.folder.iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json", "model.safetensors.index.json"} <= files
    assert not {"weights.bin", "run.json", "states"} & files
    assert not (tmp_path / "out.partial").exists()
    stored = written(result.folder)
    where = json.loads((result.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(where) == set(stored)
    assert {stored[name].dtype for name in stored if name.endswith(".weight")} == {torch.float16}
    zeros = stored["model.layers.1.mlp.down_proj.qzeros"]
    assert set(zeros.flatten().tolist()) == {0x77777777}
    assert torch.equal(stored["model.layers.0.mlp.up_proj.g_idx"], torch.arange(64, dtype=torch.int32) // 32)
    assert set(result.errors) == {f"model.layers.{i}.{name}" for i in range(2) for name in LINEAR}
    assert result.notes[0].startswith("outputs of the linear layers are off by")


def test_each_part_sees_what_the_quantized_parts_before_it_make(tmp_path: Path, tokenizer: Path) -> None:
    """The last matrix, done again from the written parts before it, comes out the same."""
    _, checkpoint = tiny()
    result = run(checkpoint, tmp_path / "out", tokenizer)
    quantized = dequantized(result.folder, checkpoint, 4)
    name = "model.layers.1.mlp.down_proj.weight"
    hessian = Hessian(96)
    batches = [random_ids(1, 48, seed=seed) for seed in range(6)]
    quantized.state["model.embed_tokens.weight"] = checkpoint.state["model.embed_tokens.weight"]

    def observer(index: int) -> Observe:
        def observe(group: str, x: torch.Tensor) -> None:
            if (index, group) == (1, "feed_forward_output"):
                hessian.add(x)

        return observe

    stream_layers(quantized, batches, observer)
    again = quantize_matrix(checkpoint.state[name], hessian.mean(), SMALL).matrix.dequantized()
    assert torch.equal(again, quantized.state[name])


class Stopped(Exception):
    """What a test's progress callback raises."""


@pytest.mark.parametrize("after", [7, 13, 14])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: Path, after: int) -> None:
    _, checkpoint = tiny(num_hidden_layers=3)
    whole = run(checkpoint, tmp_path / "whole", tokenizer)

    def kill(_: str, done: int, __: int) -> None:
        if done == after + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        run(checkpoint, tmp_path / "parts", tokenizer, progress=kill)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "parts").exists()
    result = run(checkpoint, tmp_path / "parts", tokenizer)
    assert result.resumed == after // 7
    assert contents(result.folder) == contents(whole.folder)


@pytest.mark.parametrize("name", ["run.json", "model-00002-of-00003.safetensors", "added_tokens.json"])
def test_a_file_that_a_kill_cut_off_does_not_stay(tmp_path: Path, tokenizer: Path, name: str) -> None:
    _, checkpoint = tiny()
    whole = run(checkpoint, tmp_path / "whole", tokenizer)
    if name == "run.json":  # the first file of all
        (tmp_path / "out.partial").mkdir()
    else:
        stop_after(1, checkpoint, tmp_path / "out", tokenizer)
    (tmp_path / "out.partial" / f".{name}.partial").write_bytes(b"half")
    run(checkpoint, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == contents(whole.folder)


def test_a_damaged_layer_of_a_stopped_run_is_done_again(tmp_path: Path, tokenizer: Path) -> None:
    _, checkpoint = tiny()
    whole = run(checkpoint, tmp_path / "whole", tokenizer)
    stop_after(14, checkpoint, tmp_path / "out", tokenizer)
    shard = tmp_path / "out.partial" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert run(checkpoint, tmp_path / "out", tokenizer).resumed == 0
    assert contents(tmp_path / "out") == contents(whole.folder)


def stop_after(done: int, checkpoint: InMemory, out: Path, tokenizer: Path) -> None:
    def stop(_: str, finished: int, __: int) -> None:
        if finished == done:
            raise Stopped

    with pytest.raises(Stopped):
        run(checkpoint, out, tokenizer, progress=stop)


@pytest.mark.parametrize("other", [{"bits": 3}, {"group_size": 64}, {"damping": 0.1}])
def test_a_stopped_run_with_other_settings_is_not_mixed_in(
    tmp_path: Path, tokenizer: Path, other: dict[str, float]
) -> None:
    _, checkpoint = tiny()
    out = tmp_path / "out"
    stop_after(8, checkpoint, out, tokenizer)
    settings = replace(SMALL, **other)  # type: ignore[arg-type]
    with pytest.raises(KoalaError, match="other settings"):
        run(checkpoint, out, tokenizer, settings)
    assert run(checkpoint, out, tokenizer, settings, force=True).resumed == 0


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    _, checkpoint = tiny(vocab_size=340)

    refused = []

    def second(name: str, done: int, total: int) -> None:
        with pytest.raises(KoalaError, match="another run writes"):
            run(checkpoint, tmp_path / "out", tokenizer, force=True)
        refused.append(name)

    run(checkpoint, tmp_path / "out", tokenizer, progress=second)
    assert len(refused) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]


@pytest.mark.parametrize("name", ["mine.txt", ".mine.txt.partial"])
def test_a_folder_that_no_run_left_is_kept(tmp_path: Path, tokenizer: Path, name: str) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / name).write_text("keep")
    with pytest.raises(KoalaError, match="no stopped run"):
        run(tiny()[1], tmp_path / "out", tokenizer)
    assert contents(partial) == {name: b"keep"}


def test_a_stopped_run_of_another_model_is_not_mixed_in(tmp_path: Path, tokenizer: Path) -> None:
    stop_after(8, tiny()[1], tmp_path / "out", tokenizer)
    with pytest.raises(KoalaError, match="other weights"):
        run(tiny(seed=1)[1], tmp_path / "out", tokenizer)


def test_an_existing_output_is_replaced_only_when_forced(tmp_path: Path, tokenizer: Path) -> None:
    _, checkpoint = tiny()
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(KoalaError, match="exists already"):
        run(checkpoint, out, tokenizer)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    run(checkpoint, out, tokenizer, force=True)
    assert (out / "config.json").is_file() and not (out / "mine.txt").exists()


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"],
)
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, tokenizer: Path, name: str) -> None:
    _, checkpoint = tiny()
    damaged = checkpoint.state[name].clone()
    damaged.view(-1)[5] = math.nan
    checkpoint.state[name] = damaged
    with pytest.raises(ModelFileError, match=name):
        run(checkpoint, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == ("layers.0" not in name)  # kept where a layer is done


def test_a_model_without_tokenizer_or_of_odd_size_is_refused_at_once(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ModelFileError, match="tokenizer"):
        run(tiny()[1], tmp_path / "out", tmp_path)
    with pytest.raises(ModelFileError, match=r"gate_proj\.weight is 100 x 64"):
        run(tiny(intermediate_size=100)[1], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_leaves_a_run_that_goes_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = tiny()
    whole = run(checkpoint, tmp_path / "whole", tokenizer)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("koala_local.convert.gptq.checkpoint.write_sharded", full)
        with pytest.raises(KoalaError, match="No space left"):
            run(checkpoint, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "states").mkdir()  # as a kill right after the last layer leaves it
    assert run(checkpoint, tmp_path / "out", tokenizer).resumed == 2
    assert contents(tmp_path / "out") == contents(whole.folder)


# A model that has learned something


def byte_batches(text: str, length: int = 64) -> Iterator[torch.Tensor]:
    ids = torch.tensor(list(text.encode()))
    for start in range(0, len(ids) - length, length):
        yield ids[None, start : start + length]


@pytest.fixture(scope="module")
def trained() -> InMemory:
    """A model of bytes, trained for some seconds on the calibration text."""
    text = builtin_calibration().documents[0]
    assert isinstance(text, str)
    model, _ = tiny(scale=1.0, vocab_size=256)
    ids = torch.tensor(list(text.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(220):
        starts = torch.randint(0, len(ids) - 65, (12,), generator=generator)
        batch = torch.stack([ids[start : start + 65] for start in starts.tolist()])
        loss = model(input_ids=batch[:, :-1], labels=None).logits
        step = functional.cross_entropy(loss.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(step)
        optimizer.step()
    _, frame = tiny(scale=1.0, vocab_size=256)
    return InMemory(frame.config, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def predictions(checkpoint: InMemory) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of every byte of the held text, (predictions, 256), and the bytes that came."""
    text = builtin_held_out().documents[0]
    assert isinstance(text, str)
    batches = list(byte_batches(text))[:60]
    head = Head.read(checkpoint)
    logits = [torch.cat(list(head.logits(hidden)))[:-1] for hidden in stream_layers(checkpoint, batches)]
    return torch.cat(logits).double().log_softmax(-1), torch.cat([ids[0, 1:] for ids in batches])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_trained_model_loses_less_than_by_plain_rounding(
    trained: InMemory, tmp_path: Path, tokenizer: Path, bits: int
) -> None:
    """Divergence from the source, and perplexity: source < GPTQ < nearest. At 8 bits both are as near to the source as
    float16 embeddings are, and which perplexity is lower is luck: rounding's lies below the source's here."""
    text = builtin_calibration().documents[0]
    assert isinstance(text, str)
    batches = list(byte_batches(text))[:64]
    result = quantize_gptq(trained, batches, tmp_path / "out", GptqSettings(bits, 64), tokenizer_folder=tokenizer)
    size = {64: 64, 96: 32}  # groups that divide the matrix, none larger than GPTQ's: the comparison favours rounding
    state = {
        name: nearest(tensor, bits, size[tensor.shape[1]]) if "_proj" in name else tensor
        for name, tensor in trained.state.items()
    }
    source, came = predictions(trained)
    rounded, _ = predictions(InMemory(trained.config, state))
    ours, _ = predictions(dequantized(result.folder, trained, bits))

    def perplexity(found: torch.Tensor) -> float:
        return math.exp(-found.gather(1, came[:, None]).mean())

    def divergence(found: torch.Tensor) -> float:
        return float((source.exp() * (source - found)).sum(-1).mean())

    assert perplexity(source) < 40  # it has learned: chance is 256
    assert divergence(ours) < 0.4 * divergence(rounded)
    if bits < 8:
        assert perplexity(source) < perplexity(ours) < perplexity(rounded)


def test_the_engine_runs_what_was_written(tmp_path: Path) -> None:
    """From a Hugging Face folder with tied embeddings and grouped heads to replies of the quantized model."""
    source = open_checkpoint(make_hf(tmp_path / "source", kv_heads=2, tied=True, extra_rows=4, dtype=torch.float16))
    ids = [1, *range(20, 100)]
    out = tmp_path / "out"
    quantize_gptq(source, [torch.tensor([ids])], out, GptqSettings(8, 64))
    engine = load_gptq(out, 128)
    exact, quantized = (
        torch.cat(list(Head.read(c).logits(stream_layers(c, [torch.tensor([ids])])[0])))
        for c in (source, dequantized(out, InMemory(source.config, read_all(source)), 8))
    )
    engine.evaluate(ids, slot=0, position=0)
    found = torch.tensor(engine.logits())
    assert (found - quantized[-1]).abs().max() < 1e-4
    assert (found - exact[-1]).abs().max() < 0.05 * exact[-1].std()
    assert engine.vocabulary.eos == 2


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}
