"""The memory plan: what a model takes, part by part, and what of it goes where on this machine.

Pure arithmetic over a header's numbers and the devices' free bytes. Concessions come in this order: the KV cache to
q8_0, then a shorter context down to 2048, then layers off the GPU. A value that the user has set is never conceded.

The sizes follow llama.cpp's own reports (`KV buffer size`, `compute buffer size`, `CPU_REPACK model buffer size`) with
the batch that `engine/llama.py` asks for; tests hold the two together, benchmarks/memory.py measures the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from koala_local.models.devices import Gpu, Machine
from koala_local.models.shape import Shape
from koala_local.wording import size

DEFAULT_CONTEXT = 4096  # beyond this a 13B model's KV cache outgrows a consumer card; --context asks for more
_SHORTEST = 2048  # tokens of context that are not given up
_TOKENS, _OUTPUTS, _SLOTS = 512, 64, 16  # a batch, logits reserved in it, sequences: as the engine asks llama.cpp
_PLAIN_TOKENS = 256  # computed at once without flash attention, as the engine asks
_STEP = 256  # llama.cpp rounds the context up to this
_KV_BLOCKS = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}  # values per block, bytes per block
_TOKEN_BYTES = 200  # of llama.cpp's vocabulary, beside the file
_GPU_MARGIN = 512 << 20  # for each: the driver's context, cuBLAS, what the screen takes
_RAM_MARGIN = 256 << 20
_SMALLEST_CONTEXT, _LARGEST_CONTEXT = 256 << 20, 2 << 30  # KV cache and buffers: 2048 tokens of a 13B model, and more
_RAM_SHARE = 0.8  # the rest is the system's
_WORTH_TRYING = 0.9  # after a load that failed, the next try takes at most this share


class Parts(NamedTuple):
    """Bytes in RAM and on the GPU. `repacked`: the copies of weights that a CPU keeps in another order; the file's own
    pages of these stay mapped, but may be dropped."""

    weights: int
    repacked: int
    kv: int
    compute: int
    runtime: int
    gpu_weights: int = 0
    gpu_kv: int = 0
    gpu_compute: int = 0

    @property
    def gpu(self) -> int:
        return self.gpu_weights + self.gpu_kv + self.gpu_compute

    @property
    def ram(self) -> int:
        """What must be in RAM to run at full speed."""
        return self.weights + self.kv + self.compute + self.runtime

    @property
    def anonymous(self) -> int:
        """The share of it that cannot be dropped and read from the file again."""
        return self.repacked + self.kv + self.compute + self.runtime

    @property
    def peak(self) -> int:
        """What the process grows by when nothing is dropped: pages of the file, and all else."""
        return self.ram + self.repacked


class Wish(NamedTuple):
    """What the user has set; None and "auto" leave it to the plan."""

    context: int | None = None
    kv_type: str = "auto"
    gpu_layers: int | None = None


class Choice(NamedTuple):
    context: int
    kv_type: str
    gpu_layers: int

    def __str__(self) -> str:
        layers = f", {self.gpu_layers} layers on the GPU" if self.gpu_layers else ""
        return f"context {self.context}, KV cache {self.kv_type}{layers}"


class Plan(NamedTuple):
    """What to load and how. `problem`: why even the smallest choice does not fit; "" where it does."""

    choice: Choice
    parts: Parts
    shape: Shape
    machine: Machine
    wish: Wish
    concessions: tuple[str, ...] = ()
    problem: str = ""
    hint: str = ""

    @property
    def is_hopeless(self) -> bool:
        """Whether the system would have to end some program, this one first."""
        room = self.machine.ram_available
        return bool(self.problem) and room is not None and self.parts.anonymous > room + self.machine.swap_free

    def __str__(self) -> str:
        where = f"{size(self.parts.ram)}{_of(self.machine.ram_available)} RAM"
        layers, total = self.choice.gpu_layers, self.shape.placeable
        if layers:
            room = sum(gpu.free for gpu in self.machine.gpus)
            where = f"{size(self.parts.gpu)}{_of(room)} on the GPU, {where}"
            where += "; all layers on the GPU" if layers == total else f"; {layers} of {total} layers on the GPU"
        text = f"memory: {where}; context {self.choice.context}, KV cache {self.choice.kv_type}"
        return f"{text}; to fit: {', '.join(self.concessions)}" if self.concessions else text


def _of(room: int | None) -> str:
    return "" if room is None else f" of {size(room)} free"


def estimate(shape: Shape, machine: Machine, choice: Choice) -> Parts:
    """The bytes of every part. The output goes to the GPU first, then the layers from the last one on."""
    on_gpu = max(0, choice.gpu_layers - 1)
    split = max(0, len(shape.layers) - on_gpu)
    on_cpu = [shape.input, *shape.layers[:split], *([] if choice.gpu_layers and not shape.tied else [shape.output])]
    gpu = [*shape.layers[split:], *([shape.output] if choice.gpu_layers else [])]
    kv = [_kv_bytes(widths, choice) for widths in shape.kv_widths]
    logits = _SLOTS * shape.vocabulary * 4
    weights, repacked = sum(block.size for block in on_cpu), 0
    for block in on_cpu:
        repacked += sum(block.repackable[type_] for type_ in machine.repacked)
    return Parts(
        weights=weights,
        repacked=repacked,
        kv=sum(kv[:split]),
        compute=_on_cpu(shape, choice, machine) if split else _mask(choice) + 2 * _TOKENS * shape.embedding * 4,
        runtime=_TOKEN_BYTES * shape.vocabulary + logits + (_work(shape, choice, machine) if split else 0),
        gpu_weights=sum(block.size for block in gpu),
        gpu_kv=sum(kv[split:]),
        gpu_compute=_reserved(shape, choice) * max(1, len(machine.gpus)) if choice.gpu_layers else 0,
    )


def _kv_bytes(widths: tuple[int, int], choice: Choice) -> int:
    values, block = _KV_BLOCKS[choice.kv_type]
    return _cells(choice) * sum(-(-width // values) * block for width in widths)


def _mask(choice: Choice) -> int:
    """The attention mask: 16 bits for each cell and token of a batch."""
    return _TOKENS * _cells(choice) * 2


def _cells(choice: Choice) -> int:
    return -(-choice.context // _STEP) * _STEP


def _on_cpu(shape: Shape, choice: Choice, machine: Machine) -> int:
    """As `_resident`. Without flash attention the scores of all heads lie there, and the mask has 32 bits."""
    if not _is_plain(shape, choice, machine):
        return _resident(shape, choice)
    cells, wide = _cells(choice), 5 * shape.embedding
    scores = _heads(shape) * cells + max(map(sum, shape.kv_widths), default=0)
    return _PLAIN_TOKENS * 4 * (cells + wide + max(3 * shape.feed_forward, scores))


def _work(shape: Shape, choice: Choice, machine: Machine) -> int:
    """What the CPU converts before it multiplies: activations, to 8 bits with scales, for weights; without flash
    attention the scores, to 16 bits, for V, if these are more."""
    plain = _is_plain(shape, choice, machine)
    activations = (_PLAIN_TOKENS if plain else _TOKENS) * max(shape.feed_forward, shape.embedding) * 292 // 256
    return max(activations, _PLAIN_TOKENS * _heads(shape) * _cells(choice) * 2 if plain else 0)


def _is_plain(shape: Shape, choice: Choice, machine: Machine) -> bool:
    return machine.plain_attention and not choice.gpu_layers and choice.kv_type == "f16" and bool(shape.head_size)


def _heads(shape: Shape) -> int:
    return shape.embedding // shape.head_size


def _resident(shape: Shape, choice: Choice) -> int:
    """What a batch writes to of the compute buffer: the mask and the widest place of a layer, in 32 bits."""
    return _mask(choice) + _TOKENS * 4 * max(3 * shape.feed_forward + 4 * shape.embedding, 6 * shape.embedding)


def _reserved(shape: Shape, choice: Choice) -> int:
    """The compute buffer as it is allocated: room for the logits, too."""
    logits = _OUTPUTS * shape.vocabulary * 4 + 2 * _TOKENS * shape.embedding * 4
    return max(_resident(shape, choice), logits)


def fit(shape: Shape, machine: Machine, wish: Wish) -> Plan:
    """The plan with the fewest concessions that fits; where none does, the one that asks least of the RAM with what the
    GPU holds, and the `problem`."""
    choices = list(_choices(shape, machine, wish))
    plans = [_plan(shape, machine, wish, choice, choices[0]) for choice in choices]
    found = next((plan for plan in plans if _fits_ram(plan) and _fits_gpu(plan)), None)
    if found is not None:
        return found
    plan = min([plan for plan in plans if _fits_gpu(plan)] or plans[-1:], key=lambda plan: plan.parts.ram)
    return plan._replace(problem=_problem(plan), hint=_hint(plan))


def step_down(plan: Plan) -> Plan | None:
    """The next plan that takes noticeably less, after a load that failed; None when nothing is left to concede."""
    choices = list(_choices(plan.shape, plan.machine, plan.wish))
    limit = _WORTH_TRYING * _pressing(plan.parts)
    for choice in choices[choices.index(plan.choice) + 1 :]:
        smaller = _plan(plan.shape, plan.machine, plan.wish, choice, choices[0])
        if _pressing(smaller.parts) <= limit:
            return smaller
    return None


def _pressing(parts: Parts) -> int:
    return parts.gpu or parts.anonymous


def _choices(shape: Shape, machine: Machine, wish: Wish) -> Iterator[Choice]:
    """From what is best to what takes least."""
    most = shape.placeable if machine.gpus else 0
    layers = most if wish.gpu_layers is None else min(wish.gpu_layers, most)
    context = wish.context or min(shape.trained_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    kv_type = "f16" if wish.kv_type == "auto" else wish.kv_type
    yield Choice(context, kv_type, layers)
    if wish.kv_type == "auto" and shape.head_size and shape.head_size % _KV_BLOCKS["q8_0"][0] == 0:
        kv_type = "q8_0"
        yield Choice(context, kv_type, layers)
    if wish.context is None and context > _SHORTEST:
        yield from (Choice(shorter, kv_type, layers) for shorter in _shorter(context))
        context = _SHORTEST
    if wish.gpu_layers is None:
        yield from (Choice(context, kv_type, fewer) for fewer in range(layers - 1, -1, -1))


def _shorter(context: int) -> range:
    return range((context - 1) // _STEP * _STEP, _SHORTEST - 1, -_STEP)


def _plan(shape: Shape, machine: Machine, wish: Wish, choice: Choice, best: Choice) -> Plan:
    conceded = []
    if choice.kv_type != best.kv_type:
        conceded.append(f"KV cache in {choice.kv_type}")
    if choice.context != best.context:
        conceded.append(f"context {choice.context} instead of {best.context}")
    if choice.gpu_layers != best.gpu_layers:
        conceded.append(f"{best.gpu_layers - choice.gpu_layers} of {best.gpu_layers} layers on the CPU")
    return Plan(choice, estimate(shape, machine, choice), shape, machine, wish, tuple(conceded))


def _fits_ram(plan: Plan) -> bool:
    room = plan.machine.ram_available
    return room is None or plan.parts.ram + _RAM_MARGIN <= room


def _fits_gpu(plan: Plan) -> bool:
    return plan.parts.gpu <= gpu_room(plan.machine.gpus)


def gpu_room(gpus: Sequence[Gpu]) -> int:
    """Bytes that weights, KV cache and buffers may take, over all GPUs."""
    return sum(max(0, gpu.free - _GPU_MARGIN) for gpu in gpus)


def fits_on(machine: Machine) -> Callable[[int], bool | None]:
    """Whether a model of so many bytes runs well, None where that is not known: before it is downloaded there is no
    header to plan by. It should fit the GPUs that llama.cpp uses, or, without one, the RAM."""
    memory = gpu_room(machine.gpus) if machine.gpus else int((machine.ram_total or 0) * _RAM_SHARE)

    def fits(count: int) -> bool | None:
        context = min(_LARGEST_CONTEXT, _SMALLEST_CONTEXT + count // 4)
        return count + context <= memory if memory else None

    return fits


def _problem(plan: Plan) -> str:
    if not _fits_ram(plan):
        needed, margin, free = plan.parts.ram, _RAM_MARGIN, plan.machine.ram_available or 0
        return f"it needs {size(needed)} of RAM and {size(margin)} to spare, and {size(free)} are free"
    gpus = plan.machine.gpus
    needed, margin, free = plan.parts.gpu, _GPU_MARGIN * len(gpus), sum(gpu.free for gpu in gpus)
    return f"it needs {size(needed)} on the GPU and {size(margin)} to spare, and {size(free)} are free"


def _hint(plan: Plan) -> str:
    """The change by the user that would make it fit, computed."""
    less = plan.wish._replace(context=None, kv_type="auto", gpu_layers=None)
    if less != plan.wish and not (freed := fit(plan.shape, plan.machine, less)).problem:
        choice = freed.choice
        gpu = f" --gpu-layers {choice.gpu_layers}" if plan.machine.gpus else ""
        return f"--context {choice.context} --kv-type {choice.kv_type}{gpu} would fit"
    rest = plan.parts.ram - plan.parts.weights + _RAM_MARGIN
    room = max(0, (plan.machine.ram_available or 0) - rest)
    if room > plan.shape.size // 8:  # fewer than two bits a weight for a model of 16: there is no such type
        return f"close other programs, or take a type of at most {size(room)}: `koala pull REF --list` shows sizes"
    return "close other programs, or take a smaller model"
