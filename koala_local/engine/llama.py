"""The llama.cpp engine, on the documented low-level bindings: GGUF models on CPU, CUDA, Metal or Vulkan.

The high-level `Llama` class is not used: it parses control tokens out of user text, detokenizes the whole reply at
every token and copies the logits history with each saved state.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from itertools import compress, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from koala_local.engine.base import Vocabulary, lost
from koala_local.engine.batch import Batch, tiled
from koala_local.engine.bindings import ll
from koala_local.engine.cores import physical_cores
from koala_local.engine.llama_sampler import LlamaSampler
from koala_local.engine.sampling import Sampling
from koala_local.errors import Interrupted, KoalaError, ModelFileError, OutOfMemoryError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLOTS = 15  # one for the active branch, the rest to hold others; a slot without tokens costs nothing
KV_TYPES = {"f16": ll.GGML_TYPE_F16, "q8_0": ll.GGML_TYPE_Q8_0, "q4_0": ll.GGML_TYPE_Q4_0}
_FILLER_SLOT = SLOTS  # of tokens that nobody sees, see batch.py
_BATCH = 512  # tokens that llama.cpp takes at once; on a GPU, where the abort callback does not reach, fewer
_BATCH_GPU = 128
_BATCH_PLAIN = 256  # computed at once without flash attention
_LOGIT_ROWS = 64
_SPECIAL = ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_UNKNOWN | ll.LLAMA_TOKEN_ATTR_USER_DEFINED
_HANDLES = ("_context", "_model", "_vocab", "_memory")  # of llama.cpp, until the engine is closed
_log_tail: deque[str] = deque(maxlen=8)


@ll.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _: object) -> None:
    """Keep llama.cpp's last warnings for an error message; nothing of its log reaches the terminal."""
    if level >= 3 and text.strip():
        _log_tail.append(text.decode("utf-8", "replace").strip())


_NO_LOG = ctypes.cast(ctypes.CDLL(None).abs, ll.llama_log_callback)  # no Python: the absolute value of the level


class Placement(NamedTuple):
    """Where and how a model is loaded. `gpu_layers` None: all, fewer when memory does not allow."""

    context: int
    gpu_layers: int | None = None
    kv_type: str = "f16"
    threads: int = 0


def can_offload() -> bool:
    """Whether this build of llama.cpp has a GPU backend and finds a device for it."""
    return bool(ll.llama_supports_gpu_offload())


def plain_attention() -> bool:
    """Whether an f16 KV cache is better read without flash attention here. Quantized ones need it, and it saves memory;
    but on x86 without AVX-512, behind a long history, a token takes twice as long with it, a message several times as
    long. With AVX-512 it decodes faster (benchmarks/attention.py)."""
    features = ll.llama_print_system_info()
    return not can_offload() and b"AVX2 = 1" in features and b"AVX512 = 1" not in features


class LlamaEngine:
    """A GGUF model with its KV cache. Satisfies `Engine`. The file must have been checked and probed before."""

    shares_cells = True
    slots = SLOTS

    def __init__(self, path: Path, fingerprint: str, placement: Placement) -> None:
        """Raises ModelFileError, or OutOfMemoryError when neither GPU nor RAM can hold model and KV cache."""
        self._stopped, self._stop = False, ctypes.create_string_buffer(2)
        self._handles: list[Callable[[], None]] = []
        ll.llama_log_set(_keep_log, None)
        ll.llama_backend_init()
        self.name, self.kv_type = path.stem, placement.kv_type
        self.piece = cache(self._read_piece)  # reading the vocabulary asks for one
        self.gpu_layers, self._model, self._context, self.vocabulary = _load(path, placement, self._read_vocabulary)
        self.placed = f"{self.gpu_layers} layers on the GPU" if self.gpu_layers else "all layers on the CPU"
        self._handles = [lambda: ll.llama_free(self._context), lambda: ll.llama_model_free(self._model)]
        self._memory = ll.llama_get_memory(self._context)
        self.context_size = int(ll.llama_n_ctx(self._context))
        self.trained_context = int(ll.llama_model_n_ctx_train(self._model))
        self.evaluated_tokens = 0
        self.cache_key = (
            f"model={fingerprint} context={self.context_size} kv={self.kv_type} flash={_flash_attention(self.kv_type)}"
        )
        room = min(_BATCH_GPU if self.gpu_layers else _BATCH, int(ll.llama_n_batch(self._context)))
        self._batch, self._step = Batch(room, _FILLER_SLOT), Batch(1, _FILLER_SLOT)
        plain = not (ll.llama_model_is_recurrent(self._model) or ll.llama_model_is_hybrid(self._model))
        self.can_shift = plain and bool(ll.llama_memory_can_shift(self._memory))
        flash = _flash_attention(self.kv_type) != ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._tiles = flash and plain and not self.gpu_layers and self.kv_type == "f16"  # llama.cpp has a kernel then
        self._width = int(ll.llama_model_n_embd(self._model))
        # llama.cpp polls this many times a token. libc's strlen is such a poll without any Python:
        # the stop flag is a string, empty (0, false) until `interrupt` writes a byte into it.
        self._poll = ctypes.cast(ctypes.CDLL(None).strlen, ll.ggml_abort_callback)
        ll.llama_set_abort_callback(self._context, self._poll, ctypes.addressof(self._stop))

    def _read_vocabulary(self, model: Any) -> Vocabulary:
        """It leaves `_vocab`, for `tokenize` and `piece`."""
        vocab = self._vocab = ll.llama_model_get_vocab(model)
        tokens = range(int(ll.llama_vocab_n_tokens(vocab)))
        # of each token, in C's own loop: there are up to hundreds of thousands
        texts = list(map(ll.llama_vocab_get_text, repeat(vocab), tokens))
        attrs = list(map(ll.llama_vocab_get_attr, repeat(vocab), tokens))
        ends = map(ll.llama_vocab_is_eog, repeat(vocab), tokens)
        key = hashlib.sha256(b"\0".join(texts) + array("i", attrs).tobytes())
        control: dict[str, int] = {}
        user_defined: dict[str, int] = {}
        unknown: int | None = None
        for token in (token for token in tokens if attrs[token] & _SPECIAL):
            text, attr = texts[token].decode("utf-8", "replace"), attrs[token]
            (user_defined if attr & _SPECIAL == ll.LLAMA_TOKEN_ATTR_USER_DEFINED else control)[text] = token
            if attr & ll.LLAMA_TOKEN_ATTR_UNKNOWN:
                unknown = token
        bos, eos = int(ll.llama_vocab_bos(vocab)), int(ll.llama_vocab_eos(vocab))
        space = self.tokenize("x")
        return Vocabulary(
            key=key.hexdigest(),
            size=len(tokens),
            bos=bos if bos >= 0 else None,
            eos=eos if eos >= 0 else None,
            add_bos=bool(ll.llama_vocab_get_add_bos(vocab)),
            adds_space=bool(space) and self.piece(space[0]).startswith(b" "),
            control=control,
            user_defined=user_defined,
            unknown=unknown,
            ends=frozenset(compress(tokens, ends)),
            # A space is written in three bytes, a byte in one to six: never fewer.
            longest=max(1, *map(len, texts)),
        )

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        if continues and self.vocabulary.adds_space:
            # A control character merges with nothing, so what follows it is tokenized as inside a text.
            guard = self.tokenize("\x01")
            ids = self.tokenize("\x01" + text)
            return ids[len(guard) :] if ids[: len(guard)] == guard else self.tokenize(text)
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        buffer = (ll.llama_token * room)()
        count = ll.llama_tokenize(self._vocab, data, len(data), buffer, room, False, False)
        if count < 0:
            raise KoalaError("the text is too long to tokenize", "send it in parts")
        return list(buffer[:count])

    def _read_piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = ll.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def evaluate(self, ids: Sequence[int], *, slot: int, position: int) -> None:
        room = self._batch.room
        for start in range(0, len(ids), room):
            self._read(ids[start : start + room], slot, position + start)

    def stepper(self, slot: int) -> Callable[[int, int], None]:
        tokens, positions, batch = self._step.tokens, self._step.positions, self._step.batch
        context, decode = self._context, ll.llama_decode
        self._step.slot.value = slot

        def step(token: int, position: int) -> None:
            tokens[0], positions[0] = token, position
            if self._stopped:
                raise Interrupted
            if status := decode(context, batch):
                self._give_up(status, slot, position)
            self.evaluated_tokens += 1

        return step

    def _read(self, ids: Sequence[int], slot: int, position: int) -> None:
        count = len(ids)
        size = tiled(count, position, self._width) if self._tiles else count
        if size > count:
            with suppress(OutOfMemoryError):  # no cells are free for filler
                try:
                    self._decode(self._batch.fill(ids, slot, position, size=size), count, slot, position)
                    return
                finally:
                    ll.llama_memory_seq_rm(self._memory, _FILLER_SLOT, -1, -1)
        self._decode(self._batch.fill(ids, slot, position), count, slot, position)

    def _decode(self, batch: Any, count: int, slot: int, position: int) -> None:
        if self._stopped:
            raise Interrupted
        if status := ll.llama_decode(self._context, batch):
            self._give_up(status, slot, position)
        self.evaluated_tokens += count

    def _give_up(self, status: int, slot: int, position: int) -> NoReturn:
        ll.llama_memory_seq_rm(self._memory, slot, position, -1)
        raise Interrupted if status == 2 else _decode_error(status)

    def sampler(self, sampling: Sampling, seed: int, before: Sequence[int]) -> LlamaSampler:
        return LlamaSampler(self._context, self.vocabulary.size, sampling, seed, before)

    def logits(self) -> list[float]:
        """The logits of the last evaluated token, one per vocabulary entry."""
        return list(ll.llama_get_logits_ith(self._context, -1)[: self.vocabulary.size])

    def all_logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The logits after every token of `ids`, in pieces (rows, vocabulary); they take slot 0 for themselves."""
        from numpy.ctypeslib import as_array

        self.crop(0, 0)
        for start in range(0, len(ids), _LOGIT_ROWS):
            part = ids[start : start + _LOGIT_ROWS]
            if status := ll.llama_decode(self._context, self._batch.fill(part, 0, start, every=True)):
                raise _decode_error(status)
            self.evaluated_tokens += len(part)
            rows = ll.llama_get_logits(self._context)
            yield as_array(rows, (len(part), self.vocabulary.size)).copy()
        self.crop(0, 0)

    def crop(self, slot: int, length: int) -> int:
        if ll.llama_memory_seq_rm(self._memory, slot, length, -1):
            return length
        ll.llama_memory_seq_rm(self._memory, slot, -1, -1)  # a memory that cannot be cut, such as a recurrent state
        return 0

    def copy(self, source: int, target: int) -> None:
        ll.llama_memory_seq_rm(self._memory, target, -1, -1)
        ll.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def shift(self, slot: int, start: int, end: int, last: int) -> None:
        ll.llama_memory_seq_rm(self._memory, slot, start, end)
        ll.llama_memory_seq_add(self._memory, slot, end, -1, start - end)
        position, step = ll.llama_memory_seq_pos_max(self._memory, slot), self._step
        ll.llama_memory_seq_rm(self._memory, slot, position, -1)
        step.tokens[0], step.positions[0], step.slot.value = last, position, slot
        # llama.cpp rotates the keys when it decodes next. Stopped there, it would rotate some of them again later.
        ll.llama_set_abort_callback(self._context, ll.ggml_abort_callback(), None)  # a null pointer
        status = ll.llama_decode(self._context, step.batch)
        ll.llama_set_abort_callback(self._context, self._poll, ctypes.addressof(self._stop))
        if status:
            raise _decode_error(status)
        self.evaluated_tokens += 1

    def save(self, slot: int, ids: Sequence[int], path: Path) -> None:
        tokens = (ll.llama_token * len(ids))(*ids)
        written = ll.llama_state_seq_save_file(self._context, os.fsencode(path), slot, tokens, len(ids))
        if not written or path.stat().st_size != written:  # it does not notice a disk that is full
            raise OSError(errno.ENOSPC, "llama.cpp could not write it all", str(path))

    def load(self, slot: int, path: Path) -> list[int]:
        tokens, count = (ll.llama_token * self.context_size)(), ctypes.c_size_t()
        name, size = os.fsencode(path), ctypes.byref(count)
        if not ll.llama_state_seq_load_file(self._context, name, slot, tokens, self.context_size, size):
            ll.llama_memory_seq_rm(self._memory, slot, -1, -1)
            raise OSError(f"llama.cpp could not read {path.name}")
        return list(tokens[: count.value])

    def interrupt(self) -> None:
        self._stopped, self._stop[0] = True, b"\x01"

    def resume(self) -> None:
        self._stopped, self._stop[0] = False, b"\0"

    def close(self) -> None:
        for free in self._handles:
            free()
        if self._handles:
            self._handles = []
            del self._context, self._model, self._vocab, self._memory

    def __getattr__(self, name: str) -> Any:
        """A closed engine answers with an error where llama.cpp would end the process."""
        raise lost(name, _HANDLES)


def _load(path: Path, placement: Placement, read: Callable[[Any], Vocabulary]) -> tuple[int, Any, Any, Vocabulary]:
    """Load with as many layers on the GPU as memory allows: layers, model, context, what `read` makes of the model."""
    choices = _layer_choices(placement)
    # What llama.cpp tells is heard only after a failure, in another try: of a model that loads it is thousands of
    # lines, each of which waits for Python's lock while other threads run Python.
    for layers, heard in [*((layers, False) for layers in choices), (choices[-1], True)]:
        _log_tail.clear()
        ll.llama_log_set(_keep_log if heard else _NO_LOG, None)
        try:
            if (loaded := _try_to_load(path, placement, layers, read)) is not None:
                return loaded
        finally:
            ll.llama_log_set(_keep_log, None)
    reasons = [line for line in _log_tail if not line.endswith("failed to load model")]
    reason = reasons[-1] if reasons else "llama.cpp gives no reason"
    if "alloc" in " ".join(_log_tail).lower() or "memory" in " ".join(_log_tail).lower():
        raise OutOfMemoryError(
            f"{path.name} with a context of {placement.context} does not fit in memory",
            "try a shorter --context, --kv-type q8_0, fewer --gpu-layers, or a smaller model",
        )
    raise ModelFileError(f"llama.cpp cannot load {path.name}: {reason}", "is it a text model that llama.cpp knows?")


def _try_to_load(
    path: Path, placement: Placement, layers: int, read: Callable[[Any], Vocabulary]
) -> tuple[int, Any, Any, Vocabulary] | None:
    params = ll.llama_model_default_params()
    params.n_gpu_layers = layers
    with _stopped_by_ctrl_c(params):
        model = ll.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return None
    context = None
    try:
        with ThreadPoolExecutor(1) as beside:  # the KV cache is allocated meanwhile
            reading = beside.submit(read, model)
            context = ll.llama_init_from_model(model, _context_params(placement))
        vocabulary = reading.result()
    except BaseException:
        wait([reading])
        ll.llama_free(context)
        ll.llama_model_free(model)
        raise
    if not context:
        ll.llama_model_free(model)
        return None
    return min(layers, int(ll.llama_model_n_layer(model)) + 1), model, context, vocabulary


@contextmanager
def _stopped_by_ctrl_c(params: Any) -> Iterator[None]:
    """Let Ctrl-C end the loading. The only Python that runs in this thread meanwhile is llama.cpp's callbacks, and
    ctypes drops what they raise. A handler that someone has set, and other threads, are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    stopped: list[int] = []
    params.progress_callback = proceed = ll.llama_progress_callback(lambda _share, _data: not stopped)
    signal.signal(signal.SIGINT, lambda number, _frame: stopped.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        del proceed
    if stopped:
        raise KeyboardInterrupt


def _layer_choices(placement: Placement) -> list[int]:
    if not can_offload():
        return [0]
    if placement.gpu_layers is not None:
        return [placement.gpu_layers]
    return [999, 48, 32, 24, 16, 8, 0]


def _context_params(placement: Placement) -> Any:
    params = ll.llama_context_default_params()
    params.n_ctx = placement.context
    params.n_batch = params.n_ubatch = _BATCH
    if _flash_attention(placement.kv_type) == ll.LLAMA_FLASH_ATTN_TYPE_DISABLED:
        params.n_ubatch = _BATCH_PLAIN  # the scores of all heads take memory
    params.n_seq_max = SLOTS + 1
    params.n_outputs_max = _LOGIT_ROWS  # not fewer than slots; logits of a whole batch would take room on a GPU
    params.kv_unified = True  # copies share cells; without it a partial copy aborts the process
    params.n_threads = params.n_threads_batch = placement.threads or physical_cores()
    params.type_k = params.type_v = KV_TYPES[placement.kv_type]
    params.flash_attn_type = _flash_attention(placement.kv_type)
    params.no_perf = True
    return params


def _flash_attention(kv_type: str) -> int:
    """Where nothing speaks against it, llama.cpp decides by the device."""
    if kv_type != "f16":
        return int(ll.LLAMA_FLASH_ATTN_TYPE_ENABLED)
    return int(ll.LLAMA_FLASH_ATTN_TYPE_DISABLED if plain_attention() else ll.LLAMA_FLASH_ATTN_TYPE_AUTO)


def _decode_error(status: int) -> KoalaError:
    if status == 1:
        return OutOfMemoryError("the KV cache has no free cells left", "this is a defect: please report it")
    reason = _log_tail[-1] if _log_tail else f"status {status}"
    return KoalaError(f"llama.cpp failed while evaluating: {reason}", "start again with a shorter --context")
