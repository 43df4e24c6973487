"""Whether a model of a given size fits this machine, estimated from its file size alone: before it is downloaded there
is no header to plan by."""

from __future__ import annotations

from koala_local.models.devices import Machine, this_machine
from koala_local.models.memory import gpu_room
from koala_local.models.variants import Fits

_LARGEST_CONTEXT = 2 << 30  # bytes for the KV cache and buffers: 2048 tokens of a 13B model, and more
_SMALLEST_CONTEXT = 256 << 20
_RAM_SHARE = 0.8  # the rest is the system's


def fits_here() -> Fits:
    """For this machine: into the memory of the GPUs that llama.cpp uses, or, without one, into its RAM. Looked up once.
    A GPU that this build of llama.cpp cannot use does not count: `koala doctor` says so."""
    return fits_on(this_machine())


def fits_on(machine: Machine) -> Fits:
    memory = gpu_room(machine.gpus) if machine.gpus else int((machine.ram_total or 0) * _RAM_SHARE)

    def fits(size: int) -> bool | None:
        context = min(_LARGEST_CONTEXT, _SMALLEST_CONTEXT + size // 4)
        return size + context <= memory if memory else None

    return fits
