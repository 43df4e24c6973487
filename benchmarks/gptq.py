"""GPTQ of one layer: seconds, and the error of its outputs beside plain rounding's. By hand for a 13B-shaped
layer, with peak memory and the whole model that follows from it. Random weights and activations.

    python -m benchmarks.gptq            # about 8 minutes on two cores
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
from koala_local.convert.gptq.matrix import GptqSettings, Hessian, output_error, quantize_matrix

from benchmarks.table import Row


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


_SHAPES = {"160M": _Shape(12, 768, 3072), "7B": _Shape(32, 4096, 11008), "13B": _Shape(40, 5120, 13824)}
_TOKENS = 1024  # of activations behind each Hessian: enough for full rank with damping
_CAUSES = 256


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
    shape = _SHAPES[parser.parse_args().shape]
    total = 0.0
    for name, (outputs, inputs) in shape.matrices.items():
        found = _solve(outputs, inputs)
        total += found.seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        sys.stdout.write(
            f"{name}: {outputs} x {inputs}, {found.seconds:.1f} s, output error {found.error / found.nearest:.2f} of "
            f"plain rounding's, peak so far {peak:.2f} GB\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"one layer {total:.0f} s, {shape.layers} layers {total * shape.layers / 60:.0f} min of solving\n")
    return 0


@dataclass(frozen=True, slots=True)
class _Solved:
    seconds: float
    error: float
    nearest: float  # the error of plain rounding


def _solve(outputs: int, inputs: int) -> _Solved:
    """Random weights, and inputs of fewer causes than columns and of very different size, as real ones are."""
    random = torch.Generator().manual_seed(inputs)
    causes = torch.randn(_TOKENS, _CAUSES, generator=random) @ torch.randn(_CAUSES, inputs, generator=random)
    x = causes * (0.1 + 3 * torch.rand(inputs, generator=random)) / math.sqrt(_CAUSES)
    hessian = Hessian(inputs)
    hessian.add(x + 0.1 * torch.randn(_TOKENS, inputs, generator=random))
    weights, mean = torch.randn(outputs, inputs, generator=random) * 0.02, hessian.mean()
    del hessian, causes, x
    started = time.perf_counter()
    error = quantize_matrix(weights, mean, GptqSettings()).error
    seconds = time.perf_counter() - started
    plain = GptqSettings(activation_order=False, search_scales=False)
    rounded = quantize_matrix(weights, torch.eye(inputs), plain).matrix.dequantized()  # nothing to make up for
    return _Solved(seconds, error, output_error(weights, rounded, mean))


if __name__ == "__main__":
    sys.exit(main())
