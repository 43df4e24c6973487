"""GPTQ of one layer of a 13B-shaped model on this machine, by hand: seconds a matrix, peak memory, and the whole model
that follows from it. Random weights and activations: the arithmetic does not depend on them.

    python -m benchmarks.gptq            # about 8 minutes on two cores
    python -m benchmarks.gptq --shape 160M
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import dataclass

import torch
from koala_local.convert.gptq import GptqSettings, Hessian, quantize_matrix


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gptq", description="Time GPTQ of one layer.")
    parser.add_argument("--shape", choices=_SHAPES, default="13B")
    shape = _SHAPES[parser.parse_args().shape]
    torch.manual_seed(0)
    total = 0.0
    for name, (outputs, inputs) in shape.matrices.items():
        seconds = _solve(outputs, inputs)
        total += seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        sys.stdout.write(f"{name}: {outputs} x {inputs}, {seconds:.1f} s, peak so far {peak:.2f} GB\n")
        sys.stdout.flush()
    sys.stdout.write(f"one layer {total:.0f} s, {shape.layers} layers {total * shape.layers / 60:.0f} min of solving\n")
    return 0


def _solve(outputs: int, inputs: int) -> float:
    hessian = Hessian(inputs)
    hessian.add(torch.randn(_TOKENS, inputs) * torch.rand(inputs))
    weights, mean = torch.randn(outputs, inputs) * 0.02, hessian.mean()
    del hessian
    started = time.perf_counter()
    quantize_matrix(weights, mean, GptqSettings())
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
