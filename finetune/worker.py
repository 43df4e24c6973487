"""What each rank does from its start to the exported model. All data is prepared before, so that nobody waits at a
meeting of ranks for longer than torch does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import FileStore, HashStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from koala_local import console
from koala_local.errors import KoalaError, OutOfMemoryError
from koala_local.wording import first_line, first_of

from .checkpoint import Checkpoints, Saved, latest
from .data.corpus import Corpus
from .data.packing import PackPlan
from .data.tokens import DialogueTokenizer, check_matches
from .evaluate import evaluate, held_out
from .finish import finish
from .job import Job
from .launch import MEETING_FILE, LostError, Rank, current_rank, handled_signals, is_lost
from .live_views import TrainingView
from .model import base_config, build, compute_dtype, shape_config, torch_dtype
from .optimizer import build_optimizer
from .prepare import training
from .run_log import RunLog
from .settings import Settings, as_tree, changed_keys, differences, settings_from
from .throughput import Numbers, known_gpu, utilization, work_of
from .train import Run, Step, TrainingError, restore, train
from .weights import fingerprint

CHECKPOINTS = "checkpoints"
_SHOWN = 12  # dialogues that a message names


def work(job: Job) -> int:
    """Train and export; the exit status: 0, or 128 and the number of the signal that stopped it. Raises KoalaError."""
    try:
        with (
            _joined(job) as (rank, device),
            _stops() as received,
            training(job.out) if rank.first else nullcontext(),
        ):
            return _work(job, rank, device, received)
    except torch.OutOfMemoryError as error:
        what = f"the GPU's memory is full: {first_line(error)}"
        raise OutOfMemoryError(what, "try recompute=full or micro_batch=1, and see --plan") from None
    except RuntimeError as error:
        if is_lost(error):
            raise LostError from error
        raise


def _work(job: Job, rank: Rank, device: torch.device, received: list[int]) -> int:
    settings, tokenizer, plan = job.settings, job.tokenizer, job.packed()
    total = min(plan.steps(settings.global_batch), settings.max_steps or plan.steps(settings.global_batch))
    saved = latest(job.out / CHECKPOINTS) if job.resume else None
    base = fingerprint(job.base) if job.base else ""
    here = {"data": plan.key, "settings": json.dumps(as_tree(settings)), "base": base}
    check_agreement(rank, {**here, "newest checkpoint": saved.folder.name if saved else ""})
    check_shared(rank, job.out)
    frozen = base if settings.lora else ""
    if saved:
        check_resumable(saved, settings, plan.key, frozen)
    run = _build(job, rank, device, plan, total, tokenizer)
    run.base = frozen
    if saved:
        restore(run, saved)
        if rank.first and (changed := other_draws(saved, settings)):
            console.note(changed)
    run.stops = lambda: received
    with ExitStack() as stack:
        log, view = None, None
        if rank.first:
            log = RunLog(job.out, after=run.done, settings=as_tree(settings))
            stack.callback(log.close)
            view = stack.enter_context(TrainingView(total, run.done, job.price))
        run.tell = _teller(log, view)
        run.evaluate = _evaluator(run, plan.corpus, tokenizer, log, view)
        try:
            stop = train(run)
        except TrainingError as error:
            if log:
                log.event("stopped", run.done + 1, {"why": error.message})
            raise
    if stop:
        return 128 + stop
    finish(job, run, plan)
    return 0


def _build(job: Job, rank: Rank, device: torch.device, plan: PackPlan, total: int, tokenizer: DialogueTokenizer) -> Run:
    """The run before its first step."""
    settings = job.settings
    if job.base:
        config = base_config(job.base, settings.sequence_length)
        check_matches(tokenizer, config.vocab_size)
    else:
        assert settings.model
        config = shape_config(settings.model, tokenizer.size)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    trainee = build(config, job.base, settings, device=device, mesh=_mesh(settings, rank, device))
    return Run(
        trainee=trainee,
        optimizer=build_optimizer(trainee, settings),
        plan=plan,
        settings=settings,
        total_steps=total,
        rank=rank,
        device=device,
        checkpoints=Checkpoints(job.out / CHECKPOINTS, settings.keep),
        tell=lambda _: None,
        evaluate=lambda _: None,
        mfu=_mfu(Numbers.of(config), settings, device, rank.world_size),
        name_rows=lambda rows: _origin(plan, rows),
    )


def _origin(plan: PackPlan, rows: Sequence[int] | NDArray[np.int64]) -> str:
    """Where rows come from, in words that lead there."""
    pieces = [plan.contents[plan.offsets[row] : plan.offsets[row + 1]] for row in rows]
    dialogues = np.unique(plan.pieces.document[np.concatenate(pieces)]).tolist() if pieces else []
    shown = first_of([str(each) for each in dialogues], _SHOWN)
    where = f"koala data inspect {plan.corpus.folder} --index N"
    numbers = f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}"
    return f"{numbers} of the plan, dialogues {shown} of the corpus ({where} shows them)"


def _evaluator(
    run: Run, corpus: Corpus, tokenizer: DialogueTokenizer, log: RunLog | None, view: TrainingView | None
) -> Callable[[int], None]:
    plans = held_out(corpus, run.settings.sequence_length)

    def look(step: int) -> None:
        if view:
            view.busy(f"step {step}: evaluating on what is held out")
        found = evaluate(
            run.trainee,
            plans,
            micro_batch=run.settings.micro_batch,
            rank=run.rank,
            device=run.device,
            tokenizer=tokenizer,
        )
        if log and view:
            log.event("evaluation", step, found.values())
            if found.losses:
                view.note(f"step {step}: perplexity of held-out dialogues {found.overall.perplexity:.3f}")

    return look


def check_resumable(saved: Saved, settings: Settings, plan_key: str, base: str = "") -> None:
    """Raise KoalaError, saying what, when something changed that decides the numbers of the run. `base` tells a base
    that the checkpoint does not hold, since adapters alone are trained, from others."""
    changed = differences(settings_from(dict(saved.about.get("settings") or {})), settings)
    if not changed and saved.about.get("plan") != plan_key:
        changed = ["the data, its recipe or the tokenizer are others"]
    if not changed and saved.about.get("base", "") != base:
        changed = ["its adapters are over another base"]
    if changed:
        what = f"{str(saved.folder)!r} is of a run with other settings: {'; '.join(changed)}"
        raise KoalaError(what, "resume with what it was started with, or start a new run with another -o")


def other_draws(saved: Saved, settings: Settings) -> str:
    """What to say where dropout draws otherwise from here on; empty where it does not."""
    before = settings_from(dict(saved.about["settings"])).micro_batch
    drops = settings.dropout or settings.attention_dropout or (settings.lora and settings.lora.dropout)
    if not drops or before == settings.micro_batch:
        return ""
    return f"micro_batch was {before} and is {settings.micro_batch}: from here on dropout draws otherwise"


def _mesh(settings: Settings, rank: Rank, device: torch.device) -> DeviceMesh | None:
    """The ranks to shard over. One rank needs it only to compute in another type than that of the masters."""
    if rank.world_size == 1 and compute_dtype(settings, device) == torch_dtype(settings.master_dtype):
        return None
    return init_device_mesh(device.type, (rank.world_size,))


def _mfu(numbers: Numbers, settings: Settings, device: torch.device, ranks: int) -> Callable[[float], float | None]:
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return lambda _: None
    each = work_of(numbers, settings)
    return lambda speed: utilization(speed, each, gpu.peak, ranks)


def _teller(log: RunLog | None, view: TrainingView | None) -> Callable[[Step], None]:
    def tell(step: Step) -> None:
        if log and view:
            log.step(step)
            view.step(step)

    return tell


@contextmanager
def _joined(job: Job) -> Iterator[tuple[Rank, torch.device]]:
    """Meet the other ranks. Alone, too: then no address is taken."""
    rank = current_rank()
    device = torch.device("cpu")
    if job.gpus:
        device = torch.device("cuda", rank.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if job.gpus else "gloo"
    store: Store | None = None
    if rank.world_size == 1:
        store = HashStore()
    elif meeting := os.environ.get(MEETING_FILE):
        store = FileStore(meeting, rank.world_size)
    dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.world_size)
    try:
        yield rank, device
    except BaseException:
        if rank.world_size == 1:  # else another rank may never take part in it
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _stops() -> Iterator[list[int]]:
    """The list of SIGINT and SIGTERM received. Only the first one of them is kept from ending the process."""
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    with handled_signals(remember):
        yield received


def check_shared(rank: Rank, out: Path) -> None:
    """Raise KoalaError, on all ranks, unless they see the same output folder: each writes its part of a checkpoint."""
    if rank.world_size == 1:
        return
    mark: list[Any] = [f".shared-{uuid4().hex}"]
    if rank.first:
        (out / mark[0]).touch()
    dist.broadcast_object_list(mark, src=0)
    seen: list[Any] = [None] * rank.world_size
    dist.all_gather_object(seen, (out / mark[0]).exists())
    if rank.first:
        (out / mark[0]).unlink(missing_ok=True)
    if not all(seen):
        hint = "name a folder with -o on a file system that all machines share"
        raise KoalaError(f"rank {seen.index(False)} does not see the folder {str(out)!r} of rank 0", hint)


def check_agreement(rank: Rank, here: Mapping[str, str]) -> None:
    """Raise KoalaError unless all ranks are about to do the same."""
    everyone: list[Any] = [None] * rank.world_size
    dist.all_gather_object(everyone, dict(here))
    for what, value in everyone[0].items():
        for number, there in enumerate(everyone):
            if there[what] != value:
                hint = "start koala finetune with the same options and the same data on every machine"
                named = f" ({', '.join(changed_keys(value, there[what]))})" if what == "settings" else ""
                raise KoalaError(f"rank {number} and rank 0 differ in their {what}{named}", hint)
