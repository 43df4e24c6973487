"""What one GPU (or the process, on a CPU) has to hold at the worst moment of a training step, by part.

State is sharded over the GPUs as FSDP2 does it; a forward pass gathers a block at a time in the computing type. What
autograd keeps of a block is counted tensor by tensor, as transformers' LLaMA under SDPA or flash attention saves them;
`tests/unit/finetune/test_plan.py` holds the counts against what autograd says and the sum against a process.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Literal

from .settings import Settings
from .throughput import Numbers

Device = Literal["cuda", "cpu"]

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
_MOMENTS = 2  # of AdamW
_EIGHT_BIT = 1 + 4 / 256  # bytes: a code, and a scale for each 256
_NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes: a code, and for each 64 a scale in 8 bits with scales of its own
_CUDA_CONTEXT = 1.0e9  # of the driver, the kernels and NCCL
_UNUSABLE: dict[Device, float] = {"cuda": 0.04, "cpu": 0.12}  # of what is held: pieces that the allocator keeps
LOGITS = 1 << 25  # that the loss makes at a time; 128 MiB in float32


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of each part on one GPU."""

    weights: float  # masters, and a frozen base
    gradients: float
    optimizer: float
    gathered: float  # blocks whole, in the computing type, while they compute
    activations: float  # kept from the forward for the backward pass
    working: float  # of the one block or chunk of logits that is being computed
    reserve: float  # the driver, and what fragments
    accumulates: bool  # gradients of earlier micro-batches lie beside the activations of later ones

    @property
    def peak(self) -> float:
        """The most at once. Without accumulation activations go as gradients come: the larger of them counts."""
        moving = (self.gradients, self.activations + self.working)
        fixed = self.weights + self.optimizer + self.gathered + self.reserve
        return fixed + (sum(moving) if self.accumulates else max(moving))

    def parts(self) -> dict[str, float]:
        """Bytes by name, in the order of a table."""
        names = ("weights", "gradients", "optimizer", "gathered blocks", "activations", "working space", "reserve")
        return dict(zip(names, astuple(self)[:-1], strict=True))


def compute_bytes(settings: Settings, device: Device) -> int:
    """Bytes of a number in the type that is computed in."""
    kind = settings.compute_dtype
    if kind == "auto":
        kind = "bfloat16" if device == "cuda" else "float32"
    return _BYTES[kind]


def memory_of(numbers: Numbers, settings: Settings, *, gpus: int, device: Device = "cuda") -> Memory:
    """The parts of one of `gpus` GPUs, or of a process on the CPU."""
    ranks = max(gpus, 1)
    tokens = settings.micro_batch * settings.sequence_length
    compute, master = compute_bytes(settings, device), _BYTES[settings.master_dtype]
    whole, divided, trained = _weights(numbers, settings, compute)
    moment = _EIGHT_BIT if settings.optimizer == "adamw8bit" else master
    weights = whole + divided / ranks
    gradients = trained * master / ranks
    optimizer = trained * _MOMENTS * moment / ranks
    gathered = _gathered(numbers, settings, compute) if ranks > 1 or compute != master else 0.0
    activations = _activations(numbers, settings, compute) * tokens
    working = _working(numbers, settings, compute, tokens)
    accumulates = settings.global_batch > settings.micro_batch * ranks
    held = Memory(weights, gradients, optimizer, gathered, activations, working, 0.0, accumulates)
    return replace(held, reserve=(_CUDA_CONTEXT if device == "cuda" else 0.0) + _UNUSABLE[device] * held.peak)


def _weights(numbers: Numbers, settings: Settings, compute: int) -> tuple[float, float, float]:
    """Bytes that every rank has whole, bytes that are divided among them, and how many weights are trained."""
    master = _BYTES[settings.master_dtype]
    if settings.lora is None:
        return 0.0, numbers.parameters * master, numbers.parameters
    trained = numbers.adapters(settings.lora.rank)
    linears = numbers.layers * sum(inputs * outputs for inputs, outputs in numbers.linears)
    rest = (numbers.parameters - linears) * compute + trained * master
    if settings.lora.four_bit:
        return linears * _NF4, rest, trained
    return 0.0, linears * compute + rest, trained


def _gathered(numbers: Numbers, settings: Settings, compute: int) -> float:
    """Two blocks whole (one computes, the next is on its way) and one block's gradients twice (as computed, and in the
    type they are summed in); and embedding and head, which stay whole through a step."""
    ends = numbers.embedding * (1 if numbers.tied else 2) * compute
    block = numbers.block
    if settings.lora is None:
        return ends + block * (2 * compute + compute + 4)
    if settings.lora.four_bit:  # they are whole already
        block = 0
    return ends + 2 * compute * (block + numbers.adapters(settings.lora.rank) / numbers.layers)


def block_activations(numbers: Numbers, settings: Settings, compute: int) -> float:
    """Bytes a token that autograd keeps of one block when nothing is recomputed."""
    d, wide, f = numbers.hidden, numbers.heads * numbers.head_size, numbers.feed_forward
    norms = 2 * (4 * d + 2 * compute * d)  # each: its input in float32, the normalized and the scaled
    attention = compute * 5 * wide + 4 * numbers.heads  # query, key, value (repeated for its heads), output, its copy
    feed_forward = compute * 4 * f  # gate, its SiLU, up, their product
    masks = 2 * d * compute if settings.dropout > 0 else 0  # on CUDA a byte each
    adapters = 0.0
    if settings.lora:
        dropped = sum(inputs for inputs, _ in numbers.linears) * (compute + 1) if settings.lora.dropout > 0 else 0
        adapters = dropped + len(numbers.linears) * settings.lora.rank * compute
    return norms + attention + feed_forward + masks + adapters


def _activations(numbers: Numbers, settings: Settings, compute: int) -> float:
    """Bytes a token."""
    d, wide = numbers.hidden, numbers.heads * numbers.head_size
    products = 2 * d + 2 * wide + 2 * numbers.kv_width + 2 * numbers.feed_forward
    kept = {
        "none": block_activations(numbers, settings, compute),
        "selective": compute * (d + products) + 4 * numbers.heads,
        "full": compute * d,
    }
    ends = (4 + 3 * compute) * d  # what the embedding made, the last norm
    return numbers.layers * kept[settings.recompute] + ends


def _working(numbers: Numbers, settings: Settings, compute: int, tokens: int) -> float:
    """The larger of a block that is recomputed and goes backward, and of the loss: a chunk of logits, the gradients of
    the head and of what goes into it."""
    recomputed = 0.0 if settings.recompute == "none" else block_activations(numbers, settings, compute)
    block = (recomputed + compute * (3 * numbers.feed_forward + 2 * numbers.hidden)) * tokens
    if settings.lora and settings.lora.four_bit:
        block += 2 * compute * numbers.hidden * numbers.feed_forward  # a matrix in full, and as it is unpacked
    logits = min(LOGITS, tokens * numbers.vocabulary) * (compute + 4 + compute)
    head = 0 if settings.lora else numbers.embedding * (4 + (compute if compute < 4 else 0))
    return max(block, logits + head + 2 * compute * numbers.hidden * tokens)
