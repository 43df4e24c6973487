"""Before a run: what it takes in memory, work, hours and dollars; whether it fits, and if not, what would make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from koala_local.errors import OutOfMemoryError
from koala_local.wording import duration, size

from .memory import Device, Memory, memory_of
from .settings import LoraSettings, Settings
from .throughput import A100, GPUS, PRICES_OF, Gpu, Numbers, slowdown, tokens_per_second, work_of

_LARGEST_RUN = 64  # GPUs that are proposed
_PUBLISHED_HOURS = 6.0  # of Koala 7B and 13B, 2 epochs on 8 x A100


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to train on: rows of all epochs, and what of them is no padding."""

    rows: int
    tokens: int
    steps: int
    cuts: str = ""  # what became of dialogues that are longer than a row

    @classmethod
    def of(cls, rows: int, tokens: int, settings: Settings, cuts: str = "") -> Work:
        """That of a pack plan's rows and tokens, cut to `max_steps`."""
        steps = -(-rows // settings.global_batch)
        if settings.max_steps is None or settings.max_steps >= steps:
            return cls(rows, tokens, steps, cuts)
        kept = settings.max_steps * settings.global_batch
        return cls(kept, round(tokens * kept / rows), settings.max_steps, cuts)

    def fill(self, sequence_length: int) -> float:
        return self.tokens / (self.rows * sequence_length) if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What it is to run on. `memory` is bytes of one GPU, or of the machine where there are none; None: GPUs that are
    not here, so that the plan is held against each kind."""

    gpus: int  # over all nodes; 0: the processor
    memory: float | None
    gpu: Gpu | None = None  # where its kind is known

    @property
    def device(self) -> Device:
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the whole run on GPUs of one kind, at a stated utilization."""

    gpu: Gpu
    gpus: int
    utilization: float
    tokens_per_second: float  # of all GPUs, padding included
    hours: float
    memory: Memory

    @property
    def dollars(self) -> tuple[float, float]:
        """On demand, preemptible."""
        return self.hours * self.gpus * self.gpu.on_demand, self.hours * self.gpus * self.gpu.preemptible


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether it fits into `memory` bytes. `remedies` are ways to make it fit, the first one the least change; they are
    empty when it fits, or nothing tried would do."""

    memory: float
    fits: bool
    remedies: tuple[str, ...]
    kind: str = ""  # of GPUs that are not here

    def lines(self, peak: float) -> list[str]:
        where = f" on {self.kind}" if self.kind else ""
        head = f"{'fits' if self.fits else 'DOES NOT FIT'}{where}: {_gb(peak)} of {_gb(self.memory)}"
        return [head, *(f"  would fit: {remedy}" for remedy in self.remedies)]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is said before a run. `verdicts`: one of the machine, or one of each kind of GPU."""

    numbers: Numbers
    settings: Settings
    machine: Machine
    work: Work
    memory: Memory
    flops: float
    costs: tuple[Cost, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def best(self) -> Verdict:
        """That of the most memory."""
        return max(self.verdicts, key=lambda verdict: verdict.memory)

    @property
    def dollars_an_hour(self) -> float | None:
        """Of all GPUs, at the usual price; None where it is not known."""
        return self.machine.gpu.on_demand * self.machine.gpus if self.machine.gpu else None

    def check(self) -> None:
        """Raise OutOfMemoryError, with what would help, when it does not fit."""
        best = self.best
        if not best.fits:
            what = f"the run takes {_gb(self.memory.peak)} of {_gb(best.memory)}: it will not fit"
            hint = (
                f"it would with {best.remedies[0]}" if best.remedies else "take a smaller model, or shorter sequences"
            )
            raise OutOfMemoryError(what, hint)

    def lines(self) -> list[str]:
        """The plan as text for a terminal."""
        return [*self._model_lines(), *self._memory_lines(), *self._cost_lines(), *self._published_lines()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _model_lines(self) -> list[str]:
        settings, work = self.settings, self.work
        fill = work.fill(settings.sequence_length)
        trained = ""
        if settings.lora:
            trained = f", {self.numbers.adapters(settings.lora.rank):,} of adapters are trained"
        rows = f"{work.rows:,} rows of {settings.sequence_length:,}"
        return [
            f"parameters      {self.numbers.parameters:,}{trained}",
            f"tokens          {work.tokens:,} in {rows}, {1 - fill:.1%} padding",
            *([f"cut, per epoch  {work.cuts}"] if work.cuts else []),
            f"steps           {work.steps:,} of {settings.global_batch} rows",
            f"work            {self.flops:.3g} FLOP, {work_of(self.numbers, settings) / 1e9:.4g} GFLOP a token",
        ]

    def _memory_lines(self) -> list[str]:
        gpus = self.machine.gpus
        of = f"each of {gpus} GPUs" if gpus > 1 else "the GPU" if gpus else "the process, on top of the program itself"
        parts = [f"  {name:<16}{_gb(count):>9}" for name, count in self.memory.parts().items()]
        note = "" if self.memory.accumulates else " (gradients come as activations go: the larger counts)"
        lines = [f"memory of {of}", *parts, f"  {'peak':<16}{_gb(self.memory.peak):>9}{note}"]
        return lines + [line for verdict in self.verdicts for line in verdict.lines(self.memory.peak)]

    def _cost_lines(self) -> list[str]:
        head = f"time and price at typical rental prices of {PRICES_OF}, per GPU and hour on demand / preemptible"
        return [head, *map(_cost_line, self.costs)]

    def _published_lines(self) -> list[str]:
        """Koala's own hours, beside those of a model of its sizes."""
        name = {6_738_415_616: "7B", 13_015_864_320: "13B"}.get(self.numbers.parameters)
        if name is None or self.settings.lora:
            return []
        here = cost_on(A100, self.numbers, self.settings, self.work, 8)
        there = _PUBLISHED_HOURS * 3600 * tokens_per_second(A100.peak, A100.utilization, _dense(self)) * 8
        published = f"Koala-{name}: {_PUBLISHED_HOURS:.0f} h on 8 A100, at 50% MFU {there / 1e6:.0f}M tokens"
        ours = f"this corpus likewise: {here.hours:.1f} h, {self.work.tokens / 1e6:.1f}M tokens"
        return [f"published       {published}; {ours}"]


def plan_run(numbers: Numbers, settings: Settings, work: Work, machine: Machine) -> Plan:
    """The plan of a run."""
    memory = memory_of(numbers, settings, gpus=machine.gpus, device=machine.device)
    kinds = {"": machine.memory} if machine.memory is not None else {gpu.name: gpu.memory for gpu in GPUS}
    verdicts = tuple(_verdict(numbers, settings, machine, memory.peak, kind, room) for kind, room in kinds.items())
    costs = tuple(cost_on(gpu, numbers, settings, work, max(machine.gpus, 1)) for gpu in GPUS)
    flops = work_of(numbers, settings) * work.rows * settings.sequence_length
    return Plan(numbers, settings, machine, work, memory, flops, costs, verdicts)


def _verdict(numbers: Numbers, settings: Settings, machine: Machine, peak: float, kind: str, memory: float) -> Verdict:
    if peak <= memory:
        return Verdict(memory, True, (), kind)
    return Verdict(memory, False, tuple(_remedies(numbers, settings, replace(machine, memory=memory))), kind)


def cost_on(gpu: Gpu, numbers: Numbers, settings: Settings, work: Work, gpus: int) -> Cost:
    """What the run takes on that many of this kind. Padding takes its time, too."""
    speed = tokens_per_second(gpu.peak, gpu.utilization, work_of(numbers, settings)) * gpus / slowdown(settings)
    hours = work.rows * settings.sequence_length / speed / 3600
    return Cost(gpu, gpus, gpu.utilization, speed, hours, memory_of(numbers, settings, gpus=gpus))


@dataclass(frozen=True, slots=True)
class _Choice:
    """Settings and GPUs that are tried."""

    settings: Settings
    gpus: int


_Change = Callable[[_Choice], _Choice]
_Way = list[tuple[str, _Change]]  # changes, with the words that make them


def _set(**values: object) -> _Change:
    return lambda choice: replace(choice, settings=replace(choice.settings, **values))  # type: ignore[arg-type]


def _remedies(numbers: Numbers, settings: Settings, machine: Machine) -> Iterator[str]:
    """Ways to make it fit, of each the fewest changes: settings that change no result but little; where they do not do,
    more GPUs, LoRA, QLoRA."""

    def fits(way: _Way) -> bool:
        choice = _Choice(settings, machine.gpus)
        for _, change in way:
            choice = change(choice)
        memory = memory_of(numbers, choice.settings, gpus=choice.gpus, device=machine.device)
        return memory.peak <= (machine.memory or 0)

    cheap: _Way = [
        ("micro_batch=1", _set(micro_batch=1)),
        ("recompute=full", _set(recompute="full")),
        ("optimizer=adamw8bit", _set(optimizer="adamw8bit")),
    ]
    if fits(cheap):
        yield _words(_fewest(cheap, fits))
        return
    more = [[each, *cheap] for each in _more_gpus(settings, machine)]
    adapters = [[each, *cheap] for each in _adapters(settings)]
    for way in [*[way for way in more if fits(way)][:1], *filter(fits, adapters)]:
        yield _words(_fewest(way, fits))


def _more_gpus(settings: Settings, machine: Machine) -> _Way:
    """Twice as many and so on, as long as each has a row of the global batch."""
    counts = [machine.gpus * 2**doubling for doubling in range(1, _LARGEST_RUN.bit_length())]
    largest = min(_LARGEST_RUN, settings.global_batch)
    return [(f"--gpus {count}", _gpus(count)) for count in counts if machine.gpus < count <= largest]


def _adapters(settings: Settings) -> _Way:
    lora = settings.lora or LoraSettings()
    four_bit = ("--qlora", _set(lora=replace(lora, four_bit=True)))
    if settings.lora:
        return [] if lora.four_bit else [four_bit]
    return [("--lora", _set(lora=lora)), four_bit]


def _gpus(count: int) -> _Change:
    return lambda choice: replace(choice, gpus=count)


def _fewest(way: _Way, fits: Callable[[_Way], bool]) -> _Way:
    """The changes without those that it fits without, the dearest being left out first."""
    for change in reversed(way):
        without = [each for each in way if each is not change]
        if fits(without):
            way = without
    return way


def _words(way: _Way) -> str:
    return " ".join(name for name, _ in way)


def _dense(plan: Plan) -> float:
    return work_of(plan.numbers, replace(plan.settings, sequence_length=2048, lora=None))


def _cost_line(cost: Cost) -> str:
    on_demand, preemptible = cost.dollars
    short = cost.memory.peak > cost.gpu.memory
    room = f"  (needs {_gb(cost.memory.peak)} each, has {_gb(cost.gpu.memory)})" if short else ""
    return (
        f"  {cost.gpus} x {cost.gpu.name:<5} {cost.utilization:.0%} MFU {cost.tokens_per_second:>9,.0f} tokens/s "
        f"{duration(3600 * cost.hours):>8}  ${_money(on_demand)} / ${_money(preemptible)} "
        f"at ${cost.gpu.on_demand:.2f} / ${cost.gpu.preemptible:.2f}{room}"
    )


def _gb(count: float) -> str:
    return size(count, 1)


def _money(dollars: float) -> str:
    return f"{dollars:,.0f}" if dollars >= 10 else f"{dollars:.2f}"
