"""Load a GGUF as the memory plan says, and with less when that fails all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.errors import OutOfMemoryError
from koala_local.models.devices import this_machine
from koala_local.models.gguf_header import GgufHeader
from koala_local.models.memory import Plan, Wish, fit, step_down
from koala_local.models.shape import all_tensors, read_shape

_NOTHING_LEFT = "close other programs, or take a smaller model: `koala pull REF --list` shows sizes"


def load_planned(path: Path, header: GgufHeader, wish: Wish, note: Callable[[str], None]) -> tuple[LlamaEngine, Plan]:
    """The model, checked and probed before, placed by the plan, and that plan. Every step down from the first one is
    noted. Raises ModelFileError, or OutOfMemoryError with the change that would fit."""
    plan = fit(read_shape(header, all_tensors(header)), this_machine(), wish)
    if plan.is_hopeless:
        raise OutOfMemoryError(f"{path.name} does not fit this machine: {plan.problem}", plan.hint)
    if plan.problem:
        note(f"{path.name} does not fit well: {plan.problem}; it will be slow. {plan.hint}")
    while True:
        try:
            return LlamaEngine(path, header.fingerprint, _placement(plan)), plan
        except OutOfMemoryError as error:
            smaller = step_down(plan)
            if smaller is None:
                hint = _NOTHING_LEFT if plan.wish == Wish() else error.hint
                raise OutOfMemoryError(error.message, hint) from None
            note(f"not enough memory after all for {plan.choice}; trying {smaller.choice}")
            plan = smaller


def _placement(plan: Plan) -> Placement:
    choice = plan.choice
    layers = choice.gpu_layers if plan.machine.gpus else plan.wish.gpu_layers
    return Placement(choice.context, layers, choice.kv_type)
