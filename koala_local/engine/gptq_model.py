"""transformers' LLaMA with linear layers that stay packed, and a KV cache that can be cropped and copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from koala_local.engine.gptq_files import TensorFiles
from koala_local.engine.gptq_kernels import Kernels, Unfit, installed
from koala_local.engine.gptq_layout import Layout
from koala_local.engine.gptq_linear import Parts, Placement, QuantizedLinear
from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig

_FLOATS = ("F16", "BF16", "F32")
_KV_STEP = 256  # tokens by which a slot's KV cache grows


def load_model(settings: ModelConfig, layout: Layout, files: TensorFiles, place: Placement) -> tuple[Any, str]:
    """transformers' model with all weights read from `files`, and what its linear layers are where they are not this
    project's own: on a GPU gptqmodel's, if they are installed and compute the same. Raises ModelFileError."""
    reason, kernels = "", None
    if place.device == "cuda" and installed():
        try:
            kernels = Kernels(layout, place)
            return build_model(settings, layout, files, place, kernels), kernels.name
        except (Unfit, torch.OutOfMemoryError) as error:
            reason = f"own layers: {str(error).partition(chr(10))[0]}"
        kernels = None  # with the layers that it holds, before others are made
        torch.cuda.empty_cache()
    return build_model(settings, layout, files, place), reason


def build_model(
    settings: ModelConfig, layout: Layout, files: TensorFiles, place: Placement, kernels: Kernels | None = None
) -> Any:
    """The model with layers of `kernels`, or own ones. Raises ModelFileError, and Unfit where `kernels` does."""
    last = f"model.layers.{settings.layers - 1}.self_attn.q_proj"
    files.shape(f"{last}.qweight")  # before as many layers are made as config.json says
    with torch.device("meta"):
        model = _skeleton(settings)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parts = _read_parts(name, module.in_features, module.out_features, layout, files)
            model.set_submodule(name, kernels.layer(parts) if kernels else QuantizedLinear(layout, parts, place))
    for name, parameter in list(model.named_parameters()):
        if name == "lm_head.weight" and settings.tied_embeddings:
            continue
        value = files.read(name, tuple(parameter.shape), _FLOATS).to(place.device, place.dtype)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    if settings.tied_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    rotary = type(model.model.rotary_emb)(config=model.config)  # its table is computed, not read: not on "meta"
    model.model.rotary_emb = rotary.to(place.device)
    if kernels:
        kernels.finish(model)
    return model.eval()


def _skeleton(settings: ModelConfig) -> Any:
    words = {**settings.transformers_words(), "attn_implementation": "sdpa", "pad_token_id": None}
    try:
        if settings.architecture == "MistralForCausalLM":
            return MistralForCausalLM(MistralConfig(**words))
        return LlamaForCausalLM(LlamaConfig(**words))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"transformers refuses config.json: {str(error)[:200]}", "mend the file") from None


def _read_parts(name: str, inputs: int, outputs: int, layout: Layout, files: TensorFiles) -> Parts:
    if inputs % 32 or outputs % 32:
        raise ModelFileError(
            f"{name} is {outputs} x {inputs}; GPTQ needs multiples of 32", "this cannot be a GPTQ model"
        )
    shapes = layout.shapes(inputs, outputs)
    groups = layout.groups(inputs)
    if f"{name}.bias" in files and bool(files.read(f"{name}.bias", (outputs,), _FLOATS).any()):
        raise ModelFileError(f"{name} has a bias, which LLaMA has not", "this is another kind of model")
    types = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "F32"), "g_idx": ("I32",)}
    if f"{name}.g_idx" not in files:  # the first files of 2023 have none: no order but the natural one
        index = torch.arange(inputs, dtype=torch.int32) // (inputs if layout.group_size == -1 else layout.group_size)
        parts = {"g_idx": index}
    else:
        parts = {"g_idx": files.read(f"{name}.g_idx", shapes["g_idx"], types["g_idx"])}
    for part in ("qweight", "qzeros", "scales"):
        parts[part] = files.read(f"{name}.{part}", shapes[part], types[part])
    if not 0 <= int(parts["g_idx"].min()) <= int(parts["g_idx"].max()) < groups:
        raise ModelFileError(f"{name}.g_idx names groups that are not there: there are {groups}", "the file is damaged")
    return parts


class SlotLayer(DynamicLayer):
    """One layer's keys and values, (1, heads, tokens, head size), in buffers that grow by steps: a token that is added
    copies nothing. `keys` and `values`, which transformers reads, are views of their used part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: list[torch.Tensor] = []  # for keys and for values
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, end = (key_states, value_states), self.length + key_states.shape[2]
        if not self._rooms or self._rooms[0].shape[2] < end:
            grown = [self._grown(tensor, end) for tensor in new]
            for room, old in zip(grown, self._rooms, strict=False):  # none yet: nothing to copy
                room[:, :, : self.length] = old[:, :, : self.length]
            self._rooms = grown
        for room, tensor in zip(self._rooms, new, strict=True):
            room[:, :, self.length : end] = tensor
        self.cut(end)
        return self.held()

    def _grown(self, like: torch.Tensor, tokens: int) -> torch.Tensor:
        room = max(tokens, self.length + self.length // 2)
        return like.new_empty(1, like.shape[1], -(-room // _KV_STEP) * _KV_STEP, like.shape[3])

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens; with none, the memory too is given back."""
        self.length = length
        if length == 0:
            self._rooms, self.keys, self.values = [], None, None
            self.is_initialized = False
        else:
            self.keys, self.values = self.held()

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens kept; there must be one."""
        keys, values = (room[:, :, : self.length] for room in self._rooms)
        return keys, values

    def get_seq_length(self) -> int:
        return self.length


class SlotCache(Cache):
    """The KV cache of one slot, as transformers wants it."""

    def __init__(self, layers: int) -> None:
        self.kept = [SlotLayer() for _ in range(layers)]
        super().__init__(layers=list(self.kept))

    @property
    def length(self) -> int:
        return self.kept[0].length

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens of every layer, also of those that a failed evaluation had not reached."""
        for layer in self.kept:
            layer.cut(min(length, layer.length))

    def held(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, (1, heads, tokens, head size): views. Empty where nothing is held."""
        return [layer.held() for layer in self.kept if layer.length]

    def put(self, held: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Hold copies of these instead."""
        self.cut(0)
        for layer, (keys, values) in zip(self.kept, held, strict=False):
            layer.update(keys, values)
