"""Training: useful tokens per second (of dialogues, not padding) against transformers' Trainer, with padding and with
its own packing, DataCollatorWithFlattening; same model, dialogues and optimizer, all in float32, in one run. Where
there is a GPU, also by hand:

    python -m benchmarks.finetune --gpu     MFU of 7B- and 13B-shaped layers at 2048 tokens, and the Trainer's on them;
                                            peak memory beside the planned; a QLoRA step of a 13B-shaped model
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from koala_local.finetune.checkpoint import Checkpoints
from koala_local.finetune.data.corpus import Corpus, open_corpus
from koala_local.finetune.data.corpus_writer import write_corpus
from koala_local.finetune.data.examples import Example
from koala_local.finetune.data.packing import Batch, PackPlan, make_plan
from koala_local.finetune.data.tokens import DialogueTokenizer
from koala_local.finetune.launch import Rank
from koala_local.finetune.memory import memory_of
from koala_local.finetune.model import build, inputs_of, shape_config
from koala_local.finetune.optimizer import build_optimizer, clip_gradients
from koala_local.finetune.settings import LoraSettings, ModelShape, Settings
from koala_local.finetune.throughput import Numbers, known_gpu, utilization, work_of
from koala_local.finetune.train import Run, train

from benchmarks.table import Row, markdown
from koala_local.dialogue import Dialogue, Turn

_LENGTH, _ROWS = 512, 4  # of a step: about 2048 tokens for everyone
_VOCABULARY = 8192
_SHAPE = ModelShape(hidden_size=256, feed_forward_size=704, layers=4, heads=4, kv_heads=4, context=_LENGTH)
_SETTINGS = Settings(
    sequence_length=_LENGTH, global_batch=_ROWS, micro_batch=_ROWS, warmup_steps=1, dropout=0.0, save_every=10**6,
    eval_every=10**6, spike_limit=0.0, recompute="none", model=_SHAPE,
)  # fmt: skip
_WARM = 2  # steps that are not counted
_IGNORED = -100  # labels without loss, to transformers


@dataclass(slots=True)
class _Clock:
    """Useful tokens and the time of the steps after the first."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    _last: float = field(default_factory=time.perf_counter)

    def step(self, tokens: int) -> None:
        now = time.perf_counter()
        self.steps += 1
        if self.steps > _WARM:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self._last
        self._last = now

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def run(quick: bool) -> list[Row]:
    """Rows of tokens per second against both ways of the Trainer. The best of some rounds counts, for everyone."""
    steps, rounds = (8, 1) if quick else (25, 3)
    with TemporaryDirectory() as folder:
        corpus = _corpus(Path(folder))
        plan = make_plan(corpus, _LENGTH)
        documents = round(plan.tokens / plan.rows * _ROWS / float(corpus.lengths.mean()))
        ways: dict[str, Callable[[], float]] = {
            "koala": lambda: _koala(plan, steps),
            "padding": lambda: _trainer(corpus, steps, documents, Path(folder), flat=False),
            "packing": lambda: _trainer(corpus, steps, documents, Path(folder), flat=True),
        }
        best = dict.fromkeys(ways, 0.0)
        for _ in range(rounds):
            for name, measure in ways.items():
                best[name] = max(best[name], measure())
    note = f"{_parameters() / 1e6:.0f}M parameters, {_ROWS} x {_LENGTH} tokens a step, {plan.fill:.1%} full"
    return [
        Row(
            "training, useful tokens",
            best["koala"],
            "tokens/s",
            best[peer],
            f"transformers' Trainer with {peer}",
            best["koala"] / best[peer],
            at_least=1.0,
            note=note,
        )
        for peer in ("padding", "packing")
    ]


def _parameters() -> int:
    return Numbers.of_shape(_SHAPE, _VOCABULARY).parameters


def _corpus(folder: Path) -> Corpus:
    """Dialogues of one to three turns whose lengths spread as those of people do: many short ones, a long tail."""
    from tests.checkpoint_maker import tokenizer_model

    path = folder / "tokenizer.model"
    path.write_bytes(tokenizer_model())
    dice = np.random.default_rng(0)
    words = ["koala", "tree", "river", "sea", "rain", "birds", "wire", "night", "sleep", "question", "answer", "One"]

    def text(mean: float) -> str:
        return " ".join(dice.choice(words, int(np.clip(dice.lognormal(np.log(mean), 0.8), 1, 60))))

    dialogues = [Dialogue(tuple(Turn(text(6), text(12)) for _ in range(dice.integers(1, 4)))) for _ in range(4000)]
    tokenizer = DialogueTokenizer(path)
    short = [each for each in dialogues if len(tokenizer.encode(each).ids) <= _LENGTH]
    examples = ((Example(each, "made", str(row)), False) for row, each in enumerate(short))
    write_corpus(examples, tokenizer, folder / "corpus", inputs={}, recipe={})
    return open_corpus(folder / "corpus")


def _koala(plan: PackPlan, steps: int) -> float:
    """Tokens a second of the program's own loop. The checkpoint at its end is not timed."""
    settings, device = replace(_SETTINGS, max_steps=steps), torch.device("cpu")
    trainee = build(shape_config(_SHAPE, _VOCABULARY), None, settings, device=device, mesh=None)
    clock = _Clock()
    with TemporaryDirectory() as folder:
        train(
            Run(
                trainee=trainee,
                optimizer=build_optimizer(trainee, settings),
                plan=plan,
                settings=settings,
                total_steps=steps,
                rank=Rank(),
                device=device,
                checkpoints=Checkpoints(Path(folder), 1),
                tell=lambda step: clock.step(step.tokens),
                evaluate=lambda _: None,
            )
        )
    return clock.speed


def _trainer(corpus: Corpus, steps: int, documents: int, folder: Path, *, flat: bool) -> float:
    """Tokens a second of transformers' Trainer, `documents` dialogues a step."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    clock, counts = _Clock(), list[int]()
    collate = _flattening() if flat else _padding

    def collator(rows: Sequence[dict[str, Any]]) -> Any:
        counts.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    class Timer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step(counts[clock.steps])

    options = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=documents,
        use_cpu=True,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    config: Any = shape_config(_SHAPE, _VOCABULARY)
    config.use_cache = False
    config._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(config)
    rows: Any = [_row(corpus, document) for document in range(len(corpus))]
    Trainer(model, options, data_collator=collator, train_dataset=rows, callbacks=[Timer()]).train()
    return clock.speed


def _row(corpus: Corpus, document: int) -> dict[str, Any]:
    ids, trained = corpus.document(document)
    return {"input_ids": ids.tolist(), "labels": np.where(trained, ids.astype(np.int64), _IGNORED).tolist()}


def _padding(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    ids, labels = padded("input_ids", 0), padded("labels", _IGNORED)
    places = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor(places)}


def _flattening() -> Callable[[Sequence[dict[str, Any]]], Any]:
    import transformers

    made: Any = transformers
    collator: Callable[[Sequence[dict[str, Any]]], Any] = made.DataCollatorWithFlattening(return_tensors="pt")
    return collator


# On a GPU: blocks of the published sizes, fewer of them, so that one card holds their training state.
_WIDE = {
    "7B": ModelShape(4096, 11_008, 6, 32, 32, 2048),
    "13B": ModelShape(5120, 13_824, 4, 40, 40, 2048),
}
_GOALS = {"H100": 0.45, "A100": 0.55}
_GPU_STEPS = 8


def run_gpu() -> list[Row]:
    """Rows of MFU and peak memory of wide blocks on the GPU that is there, and of a QLoRA step of a 13B shape."""
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    gpu = known_gpu(name)
    rows: list[Row] = []
    for size, shape in _WIDE.items():
        settings = Settings(model=shape, micro_batch=4, global_batch=4, compile=True, recompute="none", dropout=0.0)
        numbers = Numbers.of_shape(shape, 32_000)
        ours, memory = _gpu_speed(settings, device)
        theirs = _gpu_trainer_speed(settings, device)
        planned = memory_of(numbers, settings, gpus=1).peak
        mfu = utilization(ours, work_of(numbers, settings), gpu.peak) if gpu else None
        what = f"{size}-shaped blocks at 2048 tokens on {name}"
        goal = _GOALS.get(gpu.name) if gpu else None
        rows += [
            Row(f"MFU of {what}", mfu, at_least=goal),
            Row(f"tokens of {what}", ours, "tokens/s", theirs, "transformers' Trainer", ours / theirs, at_least=1.0),
            Row(f"memory of {what}", memory / 1e9, "GB", planned / 1e9, "planned", planned / memory, 0.9, 1.1),
        ]
    return [*rows, _qlora_row(device)]


def _qlora_row(device: torch.device) -> Row:
    shape = replace(_WIDE["13B"], layers=40)
    settings = Settings(model=shape, lora=LoraSettings(four_bit=True), recompute="full", global_batch=1)
    _, memory = _gpu_speed(settings, device)
    planned = memory_of(Numbers.of_shape(shape, 32_000), settings, gpus=1).peak
    return Row("QLoRA step of a 13B-shaped model", memory / 1e9, "GB", planned / 1e9, "planned", at_most=24.0)


def _gpu_speed(settings: Settings, device: torch.device) -> tuple[float, float]:
    """Tokens a second and the peak of memory of steps on full rows."""
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh

    dist: Any = torch.distributed
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    assert settings.model
    config = shape_config(settings.model, 32_000)
    trainee = build(config, None, settings, device=device, mesh=init_device_mesh("cuda", (1,)))
    optimizer = build_optimizer(trainee, settings)
    batch = _full_rows(settings)
    torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock()
    for _ in range(_WARM + _GPU_STEPS):
        loss = trainee(inputs_of(batch, device)) / batch.ids.size
        loss.backward()
        clip_gradients(trainee.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize(device)
        clock.step(batch.ids.size)
    peak = float(torch.cuda.max_memory_allocated(device))
    del trainee, optimizer, loss
    torch.cuda.empty_cache()
    return clock.speed, peak


def _full_rows(settings: Settings) -> Batch:
    shape = (settings.micro_batch, settings.sequence_length)
    ids = np.random.default_rng(0).integers(3, 32_000, shape)
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    return Batch(ids, ids, np.ones(shape, np.float32), positions, np.zeros(shape, np.int32))


def _gpu_trainer_speed(settings: Settings, device: torch.device) -> float:
    """Tokens a second of transformers' Trainer in bf16 on the same rows."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    clock, batch = _Clock(), _full_rows(settings)
    rows: Any = [{"input_ids": ids, "labels": ids} for ids in batch.ids.tolist()] * (_WARM + _GPU_STEPS)

    class Timer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize(device)
            clock.step(batch.ids.size)

    assert settings.model
    config: Any = shape_config(settings.model, 32_000)
    config.use_cache = False
    with TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=_WARM + _GPU_STEPS,
            per_device_train_batch_size=settings.micro_batch,
            bf16=True,
            torch_compile=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model: Any = LlamaForCausalLM(config)
        Trainer(model, options, train_dataset=rows, callbacks=[Timer()]).train()
    torch.cuda.empty_cache()
    return clock.speed


def main() -> int:
    """The exit status: 1 when a goal was not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description="Time training steps.")
    parser.add_argument("--quick", action="store_true", help="few steps; not for quoting")
    parser.add_argument("--gpu", action="store_true", help="MFU and memory on the GPU that is there")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 1
    rows = run_gpu() if options.gpu else run(options.quick)
    print(markdown(rows), end="")
    return int(any(row.ok is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
