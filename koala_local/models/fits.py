"""Whether a model of a given size fits this machine, estimated from its file size alone."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress

from koala_local.models.variants import Fits

_CONTEXT = 2 << 30  # bytes for the KV cache and buffers beside the weights: 2048 tokens of a 13B model and some more
_RAM_SHARE = 0.8  # the rest is the system's


def fits_here() -> Fits:
    """For this machine: into the memory of its NVIDIA GPUs, or, without one, into its RAM. Looked up once."""
    memory = _gpu_memory() or int(_ram() * _RAM_SHARE)

    def fits(size: int) -> bool | None:
        return size + _CONTEXT <= memory if memory else None

    return fits


def _gpu_memory() -> int:
    """Bytes of all NVIDIA GPUs together, 0 where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        return sum(int(line) for line in answer.split()) << 20
    return 0


def _ram() -> int:
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
