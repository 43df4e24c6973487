"""`koala bench MODEL`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from koala_local import console

if TYPE_CHECKING:
    from koala_local.chat.bench import Peer, Resume, Speed, TurnTime
    from koala_local.chat.loader import LoadedModel


def _lengths(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    parts = value.split(",")
    if all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        found = sorted({int(part) for part in parts} - {0})
        if found or value == "0":
            return found
    raise click.BadParameter("it is one or more numbers of tokens with commas between, or 0 for none")


@click.command(short_help="Measure how fast a model is here.")
@click.argument("model")
@click.option("--prefill", default="128,512", metavar="N,..", callback=_lengths, help="Tokens read; default 128,512.")
@click.option("--decode", default="32,128", metavar="N,..", callback=_lengths, help="Tokens written; default 32,128.")
@click.option("--turns", default=10, type=click.IntRange(0, 1000), help="Turns of a conversation; default 10.")
@click.option("--context", type=click.IntRange(256, 1 << 20), help="Tokens of context; default: as `koala chat`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def bench(model: str, prefill: list[int], decode: list[int], turns: int, context: int | None, as_json: bool) -> None:
    """Measure MODEL on this machine: tokens a second reading (prefill) and writing (decode), the time to the first
    token of every turn, going on with a saved conversation, and memory.

    When llama-bench is on the PATH, it measures the same file, for comparison. Let the machine rest meanwhile.
    """
    from koala_local.chat import bench as measure
    from koala_local.chat.loader import LoadOptions, open_model
    from koala_local.models.devices import peak_memory

    loaded = open_model(model, None, LoadOptions(context=context), console.note)
    try:
        engine = loaded.engine
        speeds = measure.measure_speeds(engine, prefill, decode) if prefill or decode else []
        engine.crop(0, 0)
        ledger = loaded.ledger("exact")
        times, resume = [], None
        if turns:
            times = measure.measure_turns(ledger, turns)
            resume = measure.measure_resume(ledger)
        peak = peak_memory()
    finally:
        loaded.engine.close()
    peer = _peer(loaded, prefill, decode)
    if peer:
        speeds = [replace(speed, peer=peer.speeds.get((speed.kind, speed.tokens))) for speed in speeds]
    if as_json:
        llama_bench = peer and {"build": peer.build, "problem": peer.problem or None}
        console.json_line({**_as_json(loaded, speeds, times, resume, peak), "llama_bench": llama_bench})
    else:
        console.out(_page(loaded, speeds, times, resume, peak))


def _peer(loaded: LoadedModel, prefill: list[int], decode: list[int]) -> Peer | None:
    """What llama-bench says of the same file on as many threads; the engine is closed, and the machine free."""
    from koala_local.chat.bench import ask_peer
    from koala_local.engine.cores import physical_cores
    from koala_local.engine.llama import Placement
    from koala_local.models.devices import ggml_version

    placed, size = loaded.engine, loaded.engine.context_size
    placement = Placement(
        size, getattr(placed, "gpu_layers", 0), getattr(placed, "kv_type", "f16"), threads=physical_cores()
    )
    peer = ask_peer(loaded.path, prefill, decode, placement)
    if peer and peer.problem:
        console.warn(f"llama-bench measured nothing: {peer.problem}")
    elif peer and peer.build:
        ours = ggml_version() or "an unknown one"
        console.note(f"llama-bench is of commit {peer.build} of llama.cpp, the library here is ggml {ours}")
    return peer


def _as_json(
    loaded: LoadedModel, speeds: list[Speed], turns: list[TurnTime], resume: Resume | None, peak: int
) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "placed": loaded.engine.placed,
        "context": loaded.engine.context_size,
        "speeds": [asdict(speed) for speed in speeds],
        "turns": [asdict(turn) for turn in turns],
        "resume": resume and asdict(resume),
        "peak_bytes": peak,
    }


def _page(loaded: LoadedModel, speeds: list[Speed], turns: list[TurnTime], resume: Resume | None, peak: int) -> str:
    from koala_local.engine.text_stream import one_line
    from koala_local.models.page import columns
    from koala_local.wording import size

    parts = [console.folded(f"{one_line(loaded.name)}: {loaded.engine.placed}, context {loaded.engine.context_size}")]
    if speeds:
        compared = any(speed.peer for speed in speeds)
        rows = [["", "TOKENS", "TOKENS/S", *(["LLAMA-BENCH", "RATIO"] if compared else [])]]
        rows += [_speed_row(speed, compared) for speed in speeds]
        parts.append(columns(rows))
    if turns:
        rows = [["TURN", "CONTEXT", "EVALUATED", "FIRST TOKEN"]]
        rows += [[str(t.turn), str(t.context), str(t.evaluated), f"{1000 * t.ttft_s:.0f} ms"] for t in turns]
        parts.append(columns(rows))
    if resume:
        load, evaluate = (f"{1000 * seconds:.0f} ms" for seconds in (resume.load_s, resume.evaluate_s))
        file = size(resume.file_bytes)
        text = f"resume {resume.tokens} tokens: {load} from a file of {file}; evaluating them takes {evaluate}"
        parts.append(console.folded(text))
    parts.append(console.folded(f"peak memory: {size(peak)}, of which some 50 MB are the program's own"))
    return "\n\n".join(parts)


def _speed_row(speed: Speed, compared: bool) -> list[str]:
    peer = [f"{speed.peer:.1f}", f"{speed.per_second / speed.peer:.2f}"] if speed.peer else ["-", "-"]
    return [speed.kind, str(speed.tokens), f"{speed.per_second:.1f}", *(peer if compared else [])]
