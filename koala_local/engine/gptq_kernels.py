"""gptqmodel's linear layers in place of this project's own, where that package is installed and there is a GPU for it.

A model runs on them only after one layer of every shape gave, on this machine, the outputs that the own layer gives.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from koala_local.engine.gptq_layout import Layout, unpack_zeros
from koala_local.engine.gptq_linear import Parts, Placement, QuantizedLinear

_CLOSE = 0.01  # of the outputs' size: kernels multiply in 16 bits, ours here in the type of the model
_TOKENS = 8


class Unfit(Exception):
    """The package has no kernel for this model, or one that computes something else."""


def installed() -> bool:
    return find_spec("gptqmodel") is not None


class Kernels:
    """The layers of one model. `backend` is a name of gptqmodel's, "auto" its own choice."""

    def __init__(self, layout: Layout, place: Placement, backend: str = "auto") -> None:
        """Raises Unfit when the package does not import."""
        self._layout, self._place, self._backend = layout, place, backend
        self._chosen: dict[tuple[bool, bool], Any] = {}
        self._samples: dict[tuple[int, ...], tuple[nn.Module, Parts]] = {}
        try:
            with _quiet():
                from gptqmodel.utils import importer, model
        except Exception as error:  # whatever it is, the own layer does the work
            raise Unfit(f"gptqmodel does not import: {str(error)[:200]}") from error
        self._select, self._convert = importer.hf_select_quant_linear_v2, model.hf_convert_gptq_v1_to_v2_format
        self._post_init = model.hf_gptqmodel_post_init

    @property
    def name(self) -> str:
        """The classes in use."""
        return "gptqmodel's " + " and ".join(sorted({kernel.__name__ for kernel in self._chosen.values()}))

    def layer(self, parts: Parts) -> nn.Module:
        """A layer that computes only after `finish`. Raises Unfit."""
        inputs, outputs = len(parts["g_idx"]), parts["scales"].shape[1]
        ordered = self._by_activation(parts["g_idx"])
        bits = self._layout.bits
        zeros = unpack_zeros(parts["qzeros"], bits)
        if int(zeros.max()) == 1 << bits:  # it keeps zero points in as many bits as codes
            raise Unfit("zero points that gptqmodel has no room for")
        symmetric = bool((zeros == 1 << (bits - 1)).all())
        settings = {
            "bits": bits,
            "group_size": self._layout.group_size,
            "desc_act": ordered,
            "sym": symmetric,
        }
        try:
            with _quiet():
                kernel = self._kernel(settings)
                layer = kernel(
                    **settings, in_features=inputs, out_features=outputs, bias=False, dtype=self._place.dtype
                )
                layer.load_state_dict(parts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Unfit(f"gptqmodel has no layer for {inputs} x {outputs}: {str(error)[:200]}") from error
        layer = layer.to(self._place.device).eval()
        self._samples.setdefault((inputs, outputs, ordered, symmetric), (layer, parts))
        made: nn.Module = layer
        return made

    def _by_activation(self, index: torch.Tensor) -> bool:
        """Whether inputs lie in another order than their groups. Kernels take groups to be full: raises Unfit."""
        size = len(index) if self._layout.group_size == -1 else self._layout.group_size
        if not torch.equal(index.sort().values, torch.arange(len(index), dtype=index.dtype) // size):
            raise Unfit("groups of unequal size")
        return bool((index.diff() < 0).any())

    def _kernel(self, settings: dict[str, Any]) -> Any:
        kind = (settings["desc_act"], settings["sym"])
        if kind not in self._chosen:
            where = {"dtype": self._place.dtype, "device_map": {"": self._place.device}, "backend": self._backend}
            self._chosen[kind] = self._select(**settings, **where, format="gptq", quant_method="gptq", pack=False)
        return self._chosen[kind]

    @torch.inference_mode()
    def finish(self, model: Any) -> None:
        """Let the layers of `model` arrange their weights; then hold one of each shape against the own layer.
        Raises Unfit."""
        kernel = next(iter(self._chosen.values()))
        try:
            with _quiet():
                self._convert(model, self._layout.bits, kernel, "gptq", None)
                self._post_init(model, use_act_order=any(ordered for ordered, _ in self._chosen))
                for (inputs, *_), (layer, parts) in self._samples.items():
                    x = torch.randn(_TOKENS, inputs, generator=torch.Generator().manual_seed(inputs))
                    x = x.to(self._place.device, self._place.dtype)
                    wanted = QuantizedLinear(self._layout, parts, self._place)(x).float()
                    error = float((layer(x).float() - wanted).norm() / wanted.norm())
                    if not error <= _CLOSE:
                        raise Unfit(f"{self.name} is off by {error:.2g} of its outputs")
        except (torch.OutOfMemoryError, Unfit):
            raise
        except Exception as error:
            raise Unfit(f"{self.name} fails: {str(error)[:200]}") from error
        self._samples.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The package tells about itself on stdout and stderr, which are the user's."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
