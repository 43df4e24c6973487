"""Load a model once in a child process, where an abort inside llama.cpp takes nothing else down.

The child reads the header and the vocabulary, allocates no weights, builds the graph of a small context and tokenizes
every byte: 0.1 s for any size of model. On Linux it is a fork, with the bindings imported before; elsewhere forking is
missing or unsafe beside system frameworks, and a new interpreter does the same more slowly.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from koala_local.engine.bindings import ll
from koala_local.engine.text_stream import one_line
from koala_local.errors import ModelFileError

_FORKS = sys.platform == "linux"
_TIMEOUT_S = 10.0  # a hundred times what any model took
_LOG_LIMIT = 1 << 16  # bytes kept of what the child wrote
_REFUSED, _BROKEN = 3, 4  # exit codes of the child, none of Python's own: llama.cpp said no; it could not even try
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_BYTES = bytes(range(1, 256))


def probe(path: Path) -> None:
    """Return when llama.cpp can load the model at `path`. Raises ModelFileError with its reason when it cannot."""
    with probing(path):
        pass


@contextmanager
def probing(path: Path) -> Iterator[None]:
    """`probe` beside what is done within, on another core if there is one. An error from within is raised first."""
    with (_forked if _FORKS else _started_anew)(path) as ended:
        yield
        code, log = ended()
    if code == 0:
        return
    reason = _reason(log)
    if code is None:
        what = f"loading it did not end within {_TIMEOUT_S:.0f} s"
    elif code == _REFUSED:
        what = f"llama.cpp cannot load it: {reason or 'it gives no reason'}"
    else:
        how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        what = f"it makes llama.cpp crash ({how}){': ' if reason else ''}{reason}"
    hint = "the file is damaged, or needs another version of llama.cpp: download it again, or try another model"
    raise ModelFileError(f"{str(path)!r}: {what}", hint)


_Ended = Callable[[], tuple[int | None, bytes]]
"""Waits for a child: its exit code, negative for a signal, None when its time was up; and what it wrote."""


@contextmanager
def _forked(path: Path) -> Iterator[_Ended]:
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():  # Python 3.12 warns of forking beside threads; this child takes no Python lock
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _be_the_child(path, write_end)
    os.close(write_end)
    status: int | None = None

    def ended() -> tuple[int | None, bytes]:
        nonlocal status
        log, closed = _read_all(read_end, time.monotonic() + _TIMEOUT_S)
        if not closed:
            return None, log
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status), log

    try:
        yield ended
    finally:
        os.close(read_end)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _read_all(read_end: int, deadline: float) -> tuple[bytes, bool]:
    """What arrives until the other end is closed, its last part; and whether it was closed before the deadline."""
    log = b""
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            part = os.read(read_end, _LOG_LIMIT)
            if not part:
                return log, True
            log = (log + part)[-_LOG_LIMIT:]
    return log, False


def _be_the_child(path: Path, write_end: int) -> NoReturn:
    code = _BROKEN
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends this process
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        code = _load(path)
    except BaseException as error:
        os.write(2, repr(error).encode(errors="replace"))
    finally:
        os._exit(code)


@contextmanager
def _started_anew(path: Path) -> Iterator[_Ended]:
    command = [sys.executable, "-m", "koala_local.models.load_probe", str(path)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # the working folder is not to be imported from
    nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=nowhere, stdout=nowhere, stderr=pipe) as child:

        def ended() -> tuple[int | None, bytes]:
            try:
                log = child.communicate(timeout=_TIMEOUT_S)[1]
            except subprocess.TimeoutExpired:
                return None, b""
            return child.returncode, log[-_LOG_LIMIT:]

        try:
            yield ended
        finally:
            child.kill()


def _load(path: Path) -> int:
    """Load `path` in this process, which may abort. Returns an exit code; the reason is written to standard error."""
    faulthandler.disable()  # it would write to where the standard error of the parent went
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else an abort starts a debugger to print one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = ll.llama_log_callback(_write_error)
    ll.llama_log_set(log, ctypes.c_void_p())
    parameters = ll.llama_model_default_params()
    parameters.no_alloc = True
    parameters.load_mode = ll.LLAMA_LOAD_MODE_NONE
    parameters.n_gpu_layers = 0
    no_devices = (ctypes.c_void_p * 1)()  # a GPU that the parent has opened cannot be used in a fork
    parameters.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    model = ll.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        return _REFUSED
    context = ll.llama_context_default_params()
    context.n_ctx, context.n_batch, context.n_ubatch = 256, 32, 32
    if not ll.llama_init_from_model(model, context):
        return _REFUSED
    vocabulary = ll.llama_model_get_vocab(model)
    tokens = (ll.llama_token * (4 * len(_BYTES)))()
    ll.llama_tokenize(vocabulary, _BYTES, len(_BYTES), tokens, len(tokens), True, False)
    return 0


def _write_error(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    if level == _ERROR:
        os.write(2, text)


def _reason(log: bytes) -> str:
    """The last thing that llama.cpp or the C++ runtime complained of, in printable characters."""
    lines = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not re.search(": failed to (load model|read tensor data)", line)]
    if not lines:
        return ""
    said = re.sub(r"^.*(?:error loading model: |what\(\): +|/(?=[\w.-]+:\d+: ))", "", lines[-1])
    return one_line(said)


if __name__ == "__main__":
    os._exit(_load(Path(sys.argv[1])))
