"""A GPTQ checkpoint from any checkpoint that is read here, one decoder layer in memory at a time.

The files are written to OUT.partial, one shard for each decoder layer as soon as it is done, and the folder gets its
name when all are there. A run that was stopped goes on behind the last shard: the finished layers are read back and run
once more over the calibration tokens, which gives the same hidden states and so, on the same machine, the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.nn.functional import linear

import koala_local
from koala_local.disk import write_whole
from koala_local.errors import KoalaError, ModelFileError

from ..forward import (
    INPUTS,
    LINEAR,
    NORMS,
    Compute,
    HiddenStates,
    LayerWeights,
    advance,
    embed,
    mix,
    norm,
    read_layer,
    widen,
)
from ..rotary import rotary_table
from ..safetensors_writer import write_json, write_sharded
from ..sources.architecture import Checkpoint, TensorInfo
from ..verify import VerificationError
from ..vocabulary.tokenizer_files import has_tokenizer
from .folder import check_free, copy_tokenizer, model_config, open_partial, publish, quantization_config, writing
from .matrix import GptqSettings, Hessian, quantize_matrix
from .pack import BITS, PARTS, check_size, pack, unpack

Progress = Callable[[str, int, int], None]  # (linear layer, how many are done, how many there are)

_FORMAT = 2  # of the manifest
_STATES = "states"  # where hidden states go that do not fit in memory


@dataclass(frozen=True, slots=True)
class GptqResult:
    """What was written. `errors` are the relative output errors, and `damped` the dampings of the linear layers that
    took a higher one than asked for; both only of the layers of this run, `resumed` others were there already."""

    folder: Path
    size: int  # bytes of weights
    resumed: int
    errors: Mapping[str, float]
    damped: Mapping[str, float]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing, for a report."""
        notes = []
        if self.errors and not self.resumed:
            worst = max(self.errors, key=lambda name: self.errors[name])
            mean = sum(self.errors.values()) / len(self.errors)
            notes.append(
                f"outputs of the linear layers are off by {mean:.2%} of their square, most in {worst}: "
                f"{self.errors[worst]:.2%}"
            )
        if self.damped:
            most = max(self.damped, key=lambda name: self.damped[name])
            notes.append(f"{len(self.damped)} linear layers took more damping, {most} most: {self.damped[most]:g}")
        return tuple(notes)


def quantize_gptq(
    checkpoint: Checkpoint,
    batches: Sequence[torch.Tensor],
    out: Path,
    settings: GptqSettings | None = None,
    *,
    tokenizer_folder: Path | None = None,
    force: bool = False,
    compute: Compute | None = None,
    progress: Progress | None = None,
    check: Callable[[Path, GptqResult], None] = lambda _, __: None,
) -> GptqResult:
    """Write `checkpoint` to the new folder `out`, its linear layers quantized on `batches` of calibration tokens,
    (batch, tokens) each. With `force` an existing `out` is replaced once the new one is complete, and what another run
    left is thrown away. Computes on the GPU where there is one, unless `compute` says otherwise. `check` may look at
    the complete folder, and add to it, before it gets its name; where it raises VerificationError, nothing is left.

    Raises ModelFileError for what is wrong with the checkpoint, KoalaError when `out` exists, when a run with other
    settings was stopped here or one is at work, or when nothing can be written."""
    settings = settings or GptqSettings()
    compute = compute or default_compute()
    out = out.absolute()
    folder = tokenizer_folder or checkpoint.tokenizer_folder
    check_free(out, force)
    if folder is None or not has_tokenizer(folder):
        raise ModelFileError("the checkpoint comes without tokenizer files", "name their folder with --tokenizer")
    _check(checkpoint, settings)
    manifest = _manifest(checkpoint, batches, settings, compute)
    partial = out.with_name(f"{out.name}.partial")
    with writing(out):
        check_free(out, force)  # another run may have ended meanwhile
        try:
            open_partial(partial, manifest, force)
            run = _Run(checkpoint, settings, compute, partial, progress)
            run.layers(batches)
            made = GptqResult(out, run.finish(folder), run.resumed, run.errors, run.damped)
            check(partial, made)
            publish(partial, out)
        except VerificationError:
            shutil.rmtree(partial)
            raise
        except ModelFileError:
            if not any(partial.glob("*.safetensors")):  # nothing to go on with
                shutil.rmtree(partial)
            raise
    return made


def default_compute() -> Compute:
    return Compute("cuda", torch.float16) if torch.cuda.is_available() else Compute()


def _check(checkpoint: Checkpoint, settings: GptqSettings) -> None:
    """Raise for what GPTQ cannot do, before anything is computed."""
    if settings.bits not in BITS:
        raise KoalaError(f"GPTQ has no {settings.bits} bits", f"it has {', '.join(map(str, BITS))}")
    if settings.group_size != -1 and (settings.group_size < 32 or settings.group_size % 32):
        raise KoalaError(f"a group cannot have {settings.group_size} inputs", "use 128, 64, 32, or -1 for no groups")
    for name, info in checkpoint.tensors.items():
        if name.endswith("_proj.weight"):
            check_size(name, *info.shape)


def _manifest(
    checkpoint: Checkpoint, batches: Sequence[torch.Tensor], settings: GptqSettings, compute: Compute
) -> dict[str, Any]:
    """What decides the bytes of the result, as JSON: two runs with one manifest can share their layers."""
    tokens, weights = hashlib.sha256(), hashlib.sha256()
    for batch in batches:
        tokens.update(f"{tuple(batch.shape)}".encode() + batch.to(torch.int64).contiguous().numpy().tobytes())
    for info in checkpoint.tensors.values():  # a row of each: the same model, without reading all of it
        row = checkpoint.read(info.name, slice(0, 1))
        weights.update(f"{info}".encode() + row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    manifest = {
        "format": _FORMAT,
        "settings": asdict(settings),
        "model": {**asdict(checkpoint.config), "name": "", "licence": ""},  # neither touches the bytes
        "weights": weights.hexdigest(),
        "calibration": tokens.hexdigest(),
        "compute": [compute.device, str(compute.dtype)],
        "versions": [koala_local.__version__, torch.__version__],
    }
    found: dict[str, Any] = json.loads(json.dumps(manifest))
    return found


class _Run:
    """One run over a checkpoint, into the folder `partial`."""

    def __init__(
        self, checkpoint: Checkpoint, settings: GptqSettings, compute: Compute, partial: Path, progress: Progress | None
    ) -> None:
        self.checkpoint, self.settings, self.compute, self.partial = checkpoint, settings, compute, partial
        self.errors: dict[str, float] = {}
        self.damped: dict[str, float] = {}
        self.resumed = 0
        self._progress = progress

    def layers(self, batches: Sequence[torch.Tensor]) -> None:
        """Write the shard of every layer that has none yet."""
        config = self.checkpoint.config
        for index in range(config.layers):
            if not self._shard_is_good(index):
                break
            self.resumed += 1
        if self.resumed < config.layers:
            folder = self.partial / _STATES
            folder.mkdir(exist_ok=True)
            states = embed(self.checkpoint, batches, folder)
            mixed = HiddenStates([(*h.shape[:2], config.heads * config.head_size) for h in states], folder)
            for index in range(config.layers):
                self._layer(index, states, mixed)
        shutil.rmtree(self.partial / _STATES, ignore_errors=True)

    def _shard(self, index: int) -> Path:
        return self.partial / f"model-{index + 2:05}-of-{self.checkpoint.config.layers + 1:05}.safetensors"

    def _shard_is_good(self, index: int) -> bool:
        try:
            return set(load_file(self._shard(index))) == set(_layer_names(index))
        except (OSError, SafetensorError):
            return False

    def _layer(self, index: int, states: HiddenStates, mixed: HiddenStates) -> None:
        """Take `states` through a layer as the finished model computes it, and write its packed form to the disk."""
        weights = read_layer(self.checkpoint, index, self.compute)
        if index < self.resumed:
            self._read_back(index, weights)
            advance(self.checkpoint.config, weights, states, compute=self.compute)
            return
        prefix = f"model.layers.{index}."
        for name, weight in weights.items():
            _refuse_not_finite(f"{prefix}{name}.weight", weight)
        halves = {name: _as_half(f"{prefix}{name}.weight", weights[name]) for name in NORMS}
        weights.update({name: half.to(weights[name]) for name, half in halves.items()})
        tensors = self._linears(index, weights, states, mixed)
        tensors |= {f"{prefix}{name}.weight": half.cpu() for name, half in halves.items()}
        write_whole(self._shard(index), [save(tensors, {"format": "pt"})])

    @torch.inference_mode()
    def _linears(
        self, index: int, weights: LayerWeights, states: HiddenStates, mixed: HiddenStates
    ) -> dict[str, torch.Tensor]:
        """The packed linear layers. Each group sees what the quantized ones before it make of `states`, which end up
        behind the layer. Everything is computed once, but gate and up twice: what they make is too much to keep."""
        config = self.checkpoint.config
        tensors = self._group(index, "attention", weights, (self._normed(weights, 0, h) for h in states))
        for hidden, mix_ in zip(states, mixed, strict=True):
            rope = rotary_table(config, hidden.shape[1], self.compute.device)
            mix_.copy_(mix(config, weights, self._normed(weights, 0, hidden), rope))
        tensors |= self._group(index, "attention_output", weights, (self._placed(x) for x in mixed))
        for hidden, mix_ in zip(states, mixed, strict=True):
            hidden.copy_(self._placed(hidden) + linear(self._placed(mix_), weights["self_attn.o_proj"]))
        tensors |= self._group(index, "feed_forward", weights, (self._normed(weights, 1, h) for h in states))
        wide = (widen(weights, self._normed(weights, 1, h)) for h in states)
        tensors |= self._group(index, "feed_forward_output", weights, wide)
        for hidden in states:
            x = widen(weights, self._normed(weights, 1, hidden))
            hidden.copy_(self._placed(hidden) + linear(x, weights["mlp.down_proj"]))
        return tensors

    def _placed(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self.compute.device, self.compute.dtype)

    def _normed(self, weights: LayerWeights, which: int, hidden: torch.Tensor) -> torch.Tensor:
        return norm(self.checkpoint.config, weights, NORMS[which], self._placed(hidden))

    def _read_back(self, index: int, weights: LayerWeights) -> None:
        prefix, stored = f"model.layers.{index}.", load_file(self._shard(index))
        for name in LINEAR:
            matrix = unpack({part: stored[f"{prefix}{name}.{part}"] for part in PARTS}, self.settings.bits)
            weights[name] = matrix.dequantized().to(weights[name])
            self._report(f"{prefix}{name}", index, name)
        for name in NORMS:
            weights[name] = stored[f"{prefix}{name}.weight"].to(weights[name])

    def _group(
        self, index: int, group: str, weights: LayerWeights, inputs: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Quantize linear layers that share their inputs, as one matrix: outputs are independent of each other. Leaves
        in `weights` what the finished model computes with, and returns what is stored of it."""
        names, prefix, stored = INPUTS[group], f"model.layers.{index}.", dict[str, torch.Tensor]()
        hessian = Hessian(weights[names[0]].shape[1], self.compute.device)
        for x in inputs:
            hessian.add(x.flatten(0, -2))
        try:
            rounded = quantize_matrix(torch.cat([weights[name] for name in names]), hessian.mean(), self.settings)
        except ModelFileError as error:
            raise ModelFileError(f"{prefix}{names[0]}: {error.message}", error.hint) from None
        start = 0
        for name in names:
            matrix = rounded.matrix.rows(slice(start, start + len(weights[name])))
            start += len(weights[name])
            weights[name] = matrix.dequantized().to(weights[name])
            self.errors[f"{prefix}{name}"] = rounded.error
            if rounded.damping > self.settings.damping:
                self.damped[f"{prefix}{name}"] = rounded.damping
            packed = pack(matrix, self.settings.bits)
            stored |= {f"{prefix}{name}.{part}": tensor.cpu() for part, tensor in packed.items()}
            self._report(f"{prefix}{name}", index, name)
        return stored

    def _report(self, name: str, index: int, linear: str) -> None:
        if self._progress:
            done = index * len(LINEAR) + LINEAR.index(linear) + 1
            self._progress(name, done, self.checkpoint.config.layers * len(LINEAR))

    def finish(self, tokenizer: Path) -> int:
        """Write everything but the layers; returns the bytes of all weights."""
        config, partial = self.checkpoint.config, self.partial
        outer = self._write_outer()
        shards = {index: self._shard(index) for index in range(config.layers)}
        where = dict.fromkeys(outer, self._shard(-1).name)
        where |= {name: path.name for index, path in shards.items() for name in _layer_names(index)}
        size = sum(path.stat().st_size for path in (self._shard(-1), *shards.values()))
        write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
        quantization = quantization_config(self.settings)
        write_json(partial / "config.json", model_config(config) | {"quantization_config": quantization})
        write_json(partial / "quantize_config.json", quantization)
        copy_tokenizer(tokenizer, partial)
        return size

    def _write_outer(self) -> list[str]:
        """The shard with embedding, last norm and output matrix, in float16; returns their names."""
        infos = [replace(info, dtype="F16") for name, info in self.checkpoint.tensors.items() if ".layers." not in name]

        def read(info: TensorInfo, rows: slice) -> torch.Tensor:
            return _as_half(info.name, self.checkpoint.read(info.name, rows))

        (written,) = write_sharded(self.partial, infos, read, shard_bytes=1 << 62)
        written.replace(self._shard(-1))
        return [info.name for info in infos]


def _layer_names(index: int) -> list[str]:
    prefix = f"model.layers.{index}."
    return [f"{prefix}{name}.{part}" for name in LINEAR for part in PARTS] + [f"{prefix}{n}.weight" for n in NORMS]


def _refuse_not_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.isfinite().all():
        raise ModelFileError(f"{name} holds NaN or infinite values", "the checkpoint is damaged: download it again")


def _as_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """In float16. Raises ModelFileError when it is not finite there."""
    half = tensor.to(torch.float16)
    _refuse_not_finite(name, half)
    return half
