"""Pack a file of weights by a kernel as Triton's interpreter runs it: TYPE, WEIGHTS, IMPORTANCE or -, OUTPUT."""

from __future__ import annotations

import sys

import numpy as np
from koala_local.convert.kernels import cuda

if __name__ == "__main__":
    type_, weights, importance, output = sys.argv[1:]
    numbers = None if importance == "-" else np.load(importance)
    with np.errstate(all="ignore"):
        packed, irregular = cuda.compiled(type_, "cpu")(np.load(weights), numbers)
    np.savez(output, packed=packed, irregular=irregular)
