"""What `koala show` tells of a model: its header's facts and the memory plan. No tensor data is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koala_local.models.card import read_card
from koala_local.models.devices import Machine
from koala_local.models.gguf_header import GgufHeader, LongArray, read_header
from koala_local.models.memory import Plan, Wish, fit
from koala_local.models.reference import repository_of
from koala_local.models.shape import all_tensors, read_shape

_TOKENIZERS = {"llama": "SentencePiece", "gpt2": "byte-level BPE", "bert": "WordPiece", "t5": "Unigram"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """How many tensors have a type, their weights and bytes."""

    type: str
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True)
class About:
    """A model. `kind`: "gguf", "gptq" or "checkpoint" (unquantized); what the files do not say is None."""

    name: str
    kind: str
    path: Path
    architecture: str
    parameters: int
    bytes: int
    tensor_types: tuple[TensorType, ...]
    layers: int | None
    embedding: int | None
    feed_forward: int | None
    heads: int | None
    kv_heads: int | None
    context: int | None
    vocabulary: int | None
    tokenizer: str | None
    template: str | None
    licence: str | None
    quantization: str | None = None
    plan: Plan | None = None
    expected_ram: int | None = None  # of a model without a plan

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def describe(path: Path, machine: Machine, wish: Wish) -> About:
    """Raises ModelFileError for files that are damaged or of another kind."""
    return _describe_folder(path) if path.is_dir() else _describe_gguf(read_header(path), machine, wish)


def _describe_gguf(header: GgufHeader, machine: Machine, wish: Wish) -> About:
    tensors = all_tensors(header)
    shape = read_shape(header, tensors)
    tokenizer = header.metadata.get("tokenizer.ggml.model")
    return About(
        name=header.name,
        kind="gguf",
        path=header.path,
        architecture=header.architecture,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        bytes=sum(tensor.size for tensor in tensors),
        tensor_types=_count((tensor.type, math.prod(tensor.shape), tensor.size) for tensor in tensors),
        layers=len(shape.layers),
        embedding=shape.embedding or None,
        feed_forward=shape.feed_forward or None,
        heads=_number(header, "attention.head_count"),
        kv_heads=_number(header, "attention.head_count_kv"),
        context=header.context_length,
        vocabulary=_vocabulary(header) or shape.vocabulary or None,
        tokenizer=_TOKENIZERS.get(tokenizer, tokenizer) if isinstance(tokenizer, str) else None,
        template=header.chat_template,
        licence=header.licence,
        plan=fit(shape, machine, wish),
    )


def _count(tensors: Iterable[tuple[str, int, int]]) -> tuple[TensorType, ...]:
    """By type, the one with most bytes first."""
    numbers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for kind, count, size in tensors:
        numbers[kind] += 1
        weights[kind] += count
        sizes[kind] += size
    return tuple(TensorType(kind, numbers[kind], weights[kind], size) for kind, size in sizes.most_common())


def _number(header: GgufHeader, key: str) -> int | None:
    """A metadata number of the architecture; of a list with one for each layer, the largest."""
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, tuple):
        value = max((number for number in value if type(number) is int), default=None)
    return value if type(value) is int and value > 0 else None


def _vocabulary(header: GgufHeader) -> int | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray):
        return tokens.length
    return len(tokens) if isinstance(tokens, tuple) else None


def _describe_folder(folder: Path) -> About:
    from koala_local.models.configuration import read_configuration, read_quantization, read_template
    from koala_local.models.safetensors_header import read_folder

    config, settings = read_configuration(folder / "config.json", quantized=True), read_quantization(folder).values
    pickles = [] if list(folder.glob("*.safetensors")) else sorted(folder.glob("pytorch_model*.bin"))
    entries = [] if pickles else read_folder(folder)
    kv = 2 * config.layers * config.kv_heads * config.head_size * 4 * min(config.context, 4096)
    # on a CPU all but the packed weights is computed in 32 bits
    ram = kv + sum(entry.size * (2 if entry.type in ("F16", "BF16") else 1) for entry in entries)
    return About(
        name=repository_of(folder) or folder.name,
        kind="gptq" if settings else "checkpoint",
        path=folder,
        architecture=config.architecture,
        parameters=config.parameters,
        bytes=sum(entry.size for entry in entries) or sum(path.stat().st_size for path in pickles),
        tensor_types=_count((entry.type, math.prod(entry.shape), entry.size) for entry in entries),
        layers=config.layers,
        embedding=config.hidden_size,
        feed_forward=config.feed_forward_size,
        heads=config.heads,
        kv_heads=config.kv_heads,
        context=config.context,
        vocabulary=config.vocabulary_size,
        tokenizer="SentencePiece" if (folder / "tokenizer.model").is_file() else "tokenizers",
        template=read_template(folder),
        licence=read_card(folder).licence or None,
        quantization=_quantization(settings),
        expected_ram=ram if settings else None,
    )


def _quantization(settings: Mapping[str, Any]) -> str | None:
    bits, group = settings.get("bits"), settings.get("group_size", -1)
    if type(bits) is not int:
        return None
    return f"GPTQ {bits} bits, " + (f"groups of {group}" if type(group) is int and group > 0 else "no groups")


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """The plan in full: names and values."""
    from koala_local.models.memory import gpu_room
    from koala_local.wording import size

    parts, choice, machine = plan.parts, plan.choice, plan.machine
    rows = [("context", f"{choice.context} tokens, KV cache {choice.kv_type}")]
    if choice.gpu_layers:
        free = sum(gpu.free for gpu in machine.gpus)
        rows.append(("layers on the GPU", f"{choice.gpu_layers} of {plan.shape.placeable}"))
        rows.append(("GPU", f"{size(parts.gpu)} of {size(free)} free, {size(gpu_room(machine.gpus))} to be used"))
        rows += [
            ("  weights", size(parts.gpu_weights)),
            ("  KV cache", size(parts.gpu_kv)),
            ("  buffers", size(parts.gpu_compute)),
        ]
    room = f" of {size(machine.ram_available)} free" if machine.ram_available is not None else ""
    rows += [
        ("RAM", f"{size(parts.ram)}{room}"),
        ("  weights", size(parts.weights)),
        ("  KV cache", size(parts.kv)),
        ("  buffers", size(parts.compute)),
        ("  vocabulary, work", size(parts.runtime)),
    ]
    if parts.repacked:
        rows.append(("peak", f"{size(parts.peak)} with the file's pages of {size(parts.repacked)} reordered weights"))
    if plan.shape.is_estimate:
        rows.append(("note", "this architecture keeps its history in a way that the plan does not know: an estimate"))
    rows += [("conceded", conceded) for conceded in plan.concessions]
    if plan.problem:
        rows += [("does not fit", plan.problem), ("remedy", plan.hint)]
    return rows


def as_json(about: About) -> dict[str, Any]:
    """Everything, for another program."""
    plan = about.plan
    return {
        **{name: value for name, value in asdict(about).items() if name != "plan"},
        "path": str(about.path),
        "bits_per_weight": round(about.bits_per_weight, 3),
        "plan": plan
        and {
            **plan.choice._asdict(),
            "placeable_layers": plan.shape.placeable,
            "bytes": {**plan.parts._asdict(), "ram": plan.parts.ram, "gpu": plan.parts.gpu, "peak": plan.parts.peak},
            "ram_available": plan.machine.ram_available,
            "gpus": [gpu._asdict() for gpu in plan.machine.gpus],
            "concessions": plan.concessions,
            "problem": plan.problem or None,
            "hint": plan.hint or None,
            "is_estimate": plan.shape.is_estimate,
        },
    }
