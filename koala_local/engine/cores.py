"""How many threads a model is computed with."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """The physical cores this process may run on: more threads than these slow llama.cpp down."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)
