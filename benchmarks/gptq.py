"""GPTQ of one layer: seconds, and the error of its outputs beside plain rounding's. By hand for a 13B-shaped
layer, with peak memory and the whole model that follows from it. Random weights and activations.

    python -m benchmarks.gptq                  # about 8 minutes on two cores
    python -m benchmarks.gptq --device cuda
    python -m benchmarks.gptq --shape 160M
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from koala_local.convert.estimate import Estimate, estimate
from koala_local.convert.forward import Compute
from koala_local.convert.gptq.matrix import GptqSettings, Hessian, output_error, quantize_matrix

from benchmarks.table import Row
from koala_local.models.configuration import ModelConfig
from koala_local.wording import duration, size


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    hidden: int
    feed_forward: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of what is solved together, because it shares its inputs."""
        hidden, wide = self.hidden, self.feed_forward
        return {"q, k, v": (3 * hidden, hidden), "o": (hidden, hidden), "gate, up": (2 * wide, hidden)} | {
            "down": (hidden, wide)
        }

    def calibration(self, compute: Compute) -> Estimate:
        """What the forward pass over the whole calibration sample takes, Hessians included."""
        heads = self.hidden // _HEAD
        config = ModelConfig(
            "LlamaForCausalLM", 32000, self.hidden, self.feed_forward, self.layers, heads, heads, _HEAD, 1e-6, 1e4,
            2048, False,
        )  # fmt: skip
        return estimate(config, 128 * 2048, 2048, head=False, gptq=True, compute=compute)


_SHAPES = {"160M": _Shape(12, 768, 3072), "7B": _Shape(32, 4096, 11008), "13B": _Shape(40, 5120, 13824)}
_TOKENS = 1024  # of activations behind each Hessian: enough for full rank with damping
_CAUSES = 256
_HEAD = 128


def run(quick: bool) -> list[Row]:
    """One layer of the 160M shape, half a minute on one core; with `quick` the matrix o alone."""
    shape = _SHAPES["160M"]
    matrices = {"o": shape.matrices["o"]} if quick else shape.matrices
    solved = [_solve(*size) for size in matrices.values()]
    seconds = sum(found.seconds for found in solved)
    worst = max(solved, key=lambda found: found.error / found.nearest)
    what = "GPTQ to 4 bits, " + ("matrix o of the 160M shape" if quick else "one layer of the 160M shape")
    return [
        Row(f"{what}, time", seconds, "s", note="solving alone: the calibration forward comes on top"),
        Row(
            f"{what}, squared output error, the worst matrix",
            worst.error,
            peer=worst.nearest,
            peer_name="round to nearest",
            ratio=worst.error / worst.nearest,
            at_most=0.4,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gptq", description="Time GPTQ of one layer.")
    parser.add_argument("--shape", choices=_SHAPES, default="13B")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    shape, device = _SHAPES[options.shape], options.device
    if device == "cuda":
        sys.stdout.write(f"{torch.cuda.get_device_name()}\n")
        _solve(256, 256, device)  # what loads its libraries
    total, peak = 0.0, 0
    for name, (outputs, inputs) in shape.matrices.items():
        found = _solve(outputs, inputs, device)
        total, peak = total + found.seconds, max(peak, found.peak)
        sys.stdout.write(
            f"{name}: {outputs} x {inputs}, {found.seconds:.1f} s, output error {found.error / found.nearest:.2f} of "
            f"plain rounding's, peak so far {size(peak)}\n"
        )
        sys.stdout.flush()
    solving = total * shape.layers
    forward = shape.calibration(Compute() if device == "cpu" else Compute("cuda", torch.float16))
    sys.stdout.write(
        f"one layer {total:.1f} s, {shape.layers} layers {duration(solving)} of solving; calibrating on "
        f"{forward}; together {duration(solving + forward.seconds)}\n"
    )
    return 0


@dataclass(frozen=True, slots=True)
class _Solved:
    seconds: float
    error: float
    nearest: float  # the error of plain rounding
    peak: int  # bytes: of the process until then, or of this solution on the GPU


def _solve(outputs: int, inputs: int, device: str = "cpu") -> _Solved:
    """Random weights, and inputs of fewer causes than columns and of very different size, as real ones are. They are
    made on the CPU: the same for both."""
    random = torch.Generator().manual_seed(inputs)
    causes = torch.randn(_TOKENS, _CAUSES, generator=random) @ torch.randn(_CAUSES, inputs, generator=random)
    x = causes * (0.1 + 3 * torch.rand(inputs, generator=random)) / math.sqrt(_CAUSES)
    hessian = Hessian(inputs, device)
    hessian.add((x + 0.1 * torch.randn(_TOKENS, inputs, generator=random)).to(device))
    weights, mean = (torch.randn(outputs, inputs, generator=random) * 0.02).to(device), hessian.mean()
    del hessian, causes, x
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    error = quantize_matrix(weights, mean, GptqSettings()).error
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident()
    plain = GptqSettings(activation_order=False, search_scales=False)
    identity = torch.eye(inputs, device=device)  # nothing to make up for
    rounded = quantize_matrix(weights, identity, plain).matrix.dequantized()
    return _Solved(seconds, error, output_error(weights, rounded, mean), peak)


def _resident() -> int:
    """Bytes that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
