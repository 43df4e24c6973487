"""The GPTQ engine: transformers' LLaMA in torch, with this project's own quantized linear layer.

Reads what `koala quantize --format gptq` writes and AutoGPTQ's files from 2023 on, asymmetric and with any order of
activations. Linear weights stay packed in memory. On a CPU it computes in float32, and slowly: GGUF is for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from koala_local.engine.base import lost
from koala_local.engine.gptq_files import TensorFiles, read_layout, read_model_settings
from koala_local.engine.gptq_linear import Placement
from koala_local.engine.gptq_model import SlotCache, load_model
from koala_local.engine.gptq_sampler import TorchSampler
from koala_local.engine.gptq_tokenizer import Expected, GptqTokenizer
from koala_local.engine.sampling import Sampling
from koala_local.errors import Interrupted, KoalaError, ModelFileError, OutOfMemoryError
from koala_local.models.reference import repository_of

SLOTS = 4  # copies share nothing: each held branch takes memory of its own
_HELD = ("_slots", "_model", "_logits")  # until the engine is closed
_BATCH = 64  # tokens between two looks at `interrupt`


def load_gptq(folder: Path, context: int) -> GptqEngine:
    """The model in `folder`, with room for `context` tokens; on the GPU in float16 where there is one.

    Raises ModelFileError for anything that is no GPTQ folder of a LLaMA or Mistral as safetensors, OutOfMemoryError."""
    if not folder.is_dir():
        raise ModelFileError(f"{str(folder)!r} is no folder", "give the folder of a GPTQ model")
    try:
        return GptqEngine(folder, context)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        what = f"{folder.name} does not fit in memory"
        raise OutOfMemoryError(what, "use a smaller model, or fewer bits") from None
    except OSError as error:
        what = f"{str(error.filename or folder)!r} cannot be read: {error.strerror or error}"
        raise ModelFileError(what, "check the folder and its permissions") from None


class GptqEngine:
    """A GPTQ folder with its KV cache. Satisfies `Engine`."""

    can_shift = False
    shares_cells = False
    slots = SLOTS

    def __init__(self, folder: Path, context: int) -> None:
        settings, layout, files = read_model_settings(folder), read_layout(folder), TensorFiles(folder)
        tokenizer = GptqTokenizer(folder, Expected(settings.vocabulary_size, settings.bos, settings.eos))
        cuda = torch.cuda.is_available()
        place = Placement("cuda", torch.float16) if cuda else Placement("cpu", torch.float32)
        self.name = repository_of(folder.absolute()) or folder.resolve().name
        self.context_size = context
        self.trained_context = settings.context
        self.vocabulary = tokenizer.vocabulary
        self.tokenize = tokenizer.tokenize
        self.evaluated_tokens = 0
        self._pieces = tokenizer.pieces
        self._device = place.device
        self._model, layers = load_model(settings, layout, files, place)
        self.placed = f"all layers on the {'GPU' if cuda else 'CPU'}" + (f" ({layers})" if layers else "")
        self._slots = [SlotCache(settings.layers) for _ in range(SLOTS)]
        self._shape = (settings.layers, settings.kv_heads, settings.head_size)
        self._logits: torch.Tensor | None = None
        self._stop = Event()
        self.cache_key = f"model={files.fingerprint} context={context} kv={place.dtype} engine=gptq".replace(
            "torch.", ""
        )

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    @torch.inference_mode()
    def evaluate(self, ids: Sequence[int], *, slot: int, position: int) -> None:
        cache = self._slots[slot]
        if position != cache.length:
            raise ValueError(f"slot {slot} holds {cache.length} tokens, not {position}")
        for start in range(0, len(ids), _BATCH):
            if self._stop.is_set():
                raise Interrupted
            hidden = self._hidden(ids[start : start + _BATCH], cache)
            if start + _BATCH >= len(ids):
                self._logits = self._model.lm_head(hidden[-1])

    def stepper(self, slot: int) -> Callable[[int, int], None]:
        return lambda token, position: self.evaluate((token,), slot=slot, position=position)

    def _hidden(self, ids: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Evaluate all of `ids`, or none: a failure leaves the slot as it was. Returns (tokens, hidden)."""
        before = cache.length
        try:
            wanted = torch.tensor([list(ids)], device=self._device)
            hidden: torch.Tensor = self._model.model(wanted, past_key_values=cache, use_cache=True).last_hidden_state[0]
        except torch.OutOfMemoryError:
            cache.cut(before)
            raise OutOfMemoryError("the GPU's memory is full", "start again with a shorter --context") from None
        except BaseException:
            cache.cut(before)
            raise
        self.evaluated_tokens += len(ids)
        return hidden

    def sampler(self, sampling: Sampling, seed: int, before: Sequence[int]) -> TorchSampler:
        return TorchSampler(self._last_logits, sampling, seed, before)

    def logits(self) -> list[float]:
        """The logits of the last evaluated token, one per vocabulary entry."""
        found: list[float] = self._last_logits().float().tolist()
        return found

    def _last_logits(self) -> torch.Tensor:
        if self._logits is None:
            raise KoalaError("nothing was evaluated yet", "this is a defect: please report it")
        return self._logits

    @torch.inference_mode()
    def all_logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The logits after every token of `ids`, in pieces (rows, vocabulary); they take slot 0 for themselves."""
        self.crop(0, 0)
        for start in range(0, len(ids), _BATCH):
            hidden = self._hidden(ids[start : start + _BATCH], self._slots[0])
            yield self._model.lm_head(hidden).float().cpu().numpy()
        self.crop(0, 0)

    def crop(self, slot: int, length: int) -> int:
        cache = self._slots[slot]
        cache.cut(min(length, cache.length))
        return cache.length

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        if source != target:
            self._slots[target].put(self._slots[source].held())

    def shift(self, slot: int, start: int, end: int, last: int) -> None:
        raise ValueError("this engine cannot shift")

    def save(self, slot: int, ids: Sequence[int], path: Path) -> None:
        tensors = {"ids": torch.tensor(list(ids), dtype=torch.int64)}
        for number, pair in enumerate(self._slots[slot].held()):
            for what, tensor in zip(("key", "value"), pair, strict=True):
                tensors[f"{what}.{number}"] = tensor[:, :, : len(ids)].cpu().contiguous()
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise OSError(f"{path.name} could not be written: {error}") from None

    @torch.inference_mode()
    def load(self, slot: int, path: Path) -> list[int]:
        self._slots[slot].cut(0)
        layers, *shape = self._shape
        try:
            with safe_open(path, framework="pt") as file:
                ids: list[int] = file.get_tensor("ids").tolist()
                numbers = range(layers if ids else 0)
                held = [(file.get_tensor(f"key.{i}"), file.get_tensor(f"value.{i}")) for i in numbers]
        except SafetensorError as error:
            raise OSError(f"{path.name} is no saved KV cache: {error}") from None
        wanted = (1, shape[0], len(ids), shape[1])
        if any(tensor.shape != wanted for pair in held for tensor in pair):
            raise OSError(f"{path.name} is the KV cache of another model")
        self._slots[slot].put([(self._placed(keys), self._placed(values)) for keys, values in held])
        return ids

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._model.dtype)

    def interrupt(self) -> None:
        self._stop.set()

    def resume(self) -> None:
        self._stop.clear()

    def close(self) -> None:
        """Give the memory of weights and KV cache back."""
        for name in _HELD:
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        """What a closed engine no longer has is asked for."""
        raise lost(name, _HELD)
