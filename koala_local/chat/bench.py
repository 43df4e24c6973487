"""How fast a model is here, in the terms of a chat: prefill and decode at given lengths, the first token of every turn,
and going on with a saved conversation. Beside it, where it is installed, what `llama-bench` says of the same file.

Lengths are measured on the engine alone, as llama-bench does; turns and resuming go through the ledger and the KV
files, as in a conversation.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from koala_local.chat.kv_files import KvFiles
from koala_local.chat.ledger import Exchange, Ledger
from koala_local.dialogue import Turn
from koala_local.engine.base import Engine
from koala_local.engine.llama import Placement, plain_attention
from koala_local.engine.sampling import Sampling
from koala_local.errors import ContextError

_REPEATS = 3
_REPLY = 24  # tokens of a turn's reply
_PEER = "llama-bench"
_PEER_TIMEOUT_S = 600
_MESSAGE = "Number {:03d}: tell me what the old cat said to the dog, and why it was not amused by that."


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second over `tokens` tokens from an empty context; `peer`: what llama-bench gives for the same."""

    kind: str  # "prefill" or "decode"
    tokens: int
    per_second: float
    peer: float | None = None


@dataclass(frozen=True, slots=True)
class TurnTime:
    turn: int
    context: int  # tokens before the reply
    evaluated: int  # of these, those that were not in the KV cache
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Resume:
    """Loading a saved KV cache, against evaluating its tokens."""

    tokens: int
    file_bytes: int
    load_s: float
    evaluate_s: float


def measure_speeds(engine: Engine, prefill: Sequence[int], decode: Sequence[int]) -> list[Speed]:
    """The median of three runs each. Raises ContextError for a length that the context does not hold."""
    longest = max([*prefill, *(length + 1 for length in decode)])
    if longest > engine.context_size:
        raise ContextError(
            f"{longest} tokens do not fit the context of {engine.context_size}", "give shorter lengths, or --context"
        )
    _fill(engine, min(32, longest))  # the first batch is slower: memory is touched, threads start
    speeds = [Speed("prefill", length, _per_second(engine, length, _fill)) for length in prefill]
    return speeds + [Speed("decode", length, _per_second(engine, length, _write)) for length in decode]


def _per_second(engine: Engine, tokens: int, work: Callable[[Engine, int], float]) -> float:
    return tokens / median(work(engine, tokens) for _ in range(_REPEATS))


def _fill(engine: Engine, length: int) -> float:
    """Seconds to read `length` tokens into an empty slot."""
    engine.crop(0, 0)
    ids = [_token(engine, position) for position in range(length)]
    started = time.perf_counter()
    engine.evaluate(ids, slot=0, position=0)
    return time.perf_counter() - started


def _write(engine: Engine, length: int) -> float:
    """Seconds for `length` single tokens behind one."""
    _fill(engine, 1)
    started = time.perf_counter()
    for position in range(1, length + 1):
        engine.evaluate([_token(engine, position)], slot=0, position=position)
    return time.perf_counter() - started


def _token(engine: Engine, position: int) -> int:
    return position * 7919 % engine.vocabulary.size


def measure_turns(ledger: Ledger, turns: int) -> list[TurnTime]:
    """The first token of each turn of one conversation, until `turns` are over or a turn would have to leave."""
    path: list[Exchange] = []
    found: list[TurnTime] = []
    for turn in range(1, turns + 1):
        message = Exchange(Turn(_MESSAGE.format(turn)))
        answer = ledger.reply("", [*path, message], 0, Sampling(max_tokens=_REPLY), turn)
        stats = answer.stats
        if stats.dropped_turns:
            break
        path.append(Exchange(Turn(message.turn.user, answer.text), answer.ids))
        found.append(TurnTime(turn, stats.prompt_tokens, stats.evaluated_tokens, stats.ttft_s))
    return found


def measure_resume(ledger: Ledger) -> Resume:
    """Save what the ledger holds, and load it again into an empty cache. Raises SessionError or CacheMiss."""
    ids, engine = list(ledger.cache.ids), ledger.engine
    with TemporaryDirectory(prefix="koala-bench-") as folder:
        files = KvFiles(Path(folder))
        files.save("bench", engine, ledger.cache.active, ids)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        ledger.cache.clear()
        started = time.perf_counter()
        ledger.cache.restore(lambda slot: files.restore("bench", engine, slot))
        loading = time.perf_counter() - started
    ledger.cache.clear()
    started = time.perf_counter()
    ledger.cache.extend(ids)
    return Resume(len(ids), size, loading, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Peer:
    """What llama-bench measured: tokens a second by kind and length, of which build of llama.cpp; or why nothing."""

    speeds: Mapping[tuple[str, int], float]
    build: str = ""
    problem: str = ""


def ask_peer(path: Path, prefill: Sequence[int], decode: Sequence[int], placement: Placement) -> Peer | None:
    """Let llama-bench measure the same file, placed as it was here; None where it is not on the PATH."""
    program = shutil.which(_PEER)
    if program is None or path.is_dir() or not (prefill or decode):
        return None
    read, written = (",".join(map(str, lengths)) or "0" for lengths in (prefill, decode))
    command = [program, "-m", str(path), "-p", read, "-n", written, "-ngl", str(placement.gpu_layers or 0)]
    command += ["-t", str(placement.threads), "-ctk", placement.kv_type, "-ctv", placement.kv_type]
    command += ["-fa", "0"] if placement.kv_type == "f16" and plain_attention() else []  # as the engine decides
    command += ["-r", str(_REPEATS), "-o", "json"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PEER_TIMEOUT_S, check=False
        )
    except OSError as error:
        return Peer({}, problem=f"{program} cannot be run: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Peer({}, problem=f"it was not ready after {_PEER_TIMEOUT_S} s")
    peer = read_peer(done.stdout.decode("utf-8", "replace"))
    if peer.speeds:
        return peer
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return Peer({}, problem=said[-1] if said else f"its output cannot be read (exit status {done.returncode})")


def read_peer(output: str) -> Peer:
    """What `llama-bench -o json` prints: an array of one object a test (llama.cpp's tools/llama-bench/README.md). With
    `n_prompt` alone it is prefill, with `n_gen` alone decode; `samples_ts` are tokens a second, one for each run."""
    match = re.search(r"^\[.*^\]", output, re.MULTILINE | re.DOTALL)
    try:
        tests = json.loads(match[0]) if match else []
    except ValueError:
        tests = []
    found: dict[tuple[str, int], float] = {}
    build = ""
    for test in tests:
        try:
            read, written, speeds = test["n_prompt"], test["n_gen"], [float(speed) for speed in test["samples_ts"]]
            found["prefill" if read else "decode", int(read or written)] = median(speeds)
            build = str(test["build_commit"])
        except (TypeError, KeyError, ValueError):
            continue
    return Peer(found, build)
