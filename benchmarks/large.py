"""`koala quantize` of a whole model of random weights, by hand: minutes, memory, and where the time goes.

    python -m benchmarks.large --shape 13b     # writes 26 GB below --folder and removes them afterwards, and reads them

A block of random weights, repeated with other powers of two, is written as fast as the disk takes it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from koala_local.convert.gguf import kquants
from koala_local.convert.gguf import write as converter
from koala_local.convert.kernels.choice import choose_kernels, kernel
from koala_local.convert.sources.checkpoint import open_checkpoint
from koala_local.convert.vocabulary.read import read_vocabulary

from benchmarks.models import RUNS
from tests.checkpoint_maker import make_hf

_SHAPES = {  # layers, hidden, heads, KV heads, feed-forward
    "0.5b": (12, 1536, 12, 12, 4096),
    "1.1b": (22, 2048, 32, 4, 5632),
    "7b": (32, 4096, 32, 32, 11008),
    "13b": (40, 5120, 40, 40, 13824),
}
_VOCABULARY = 32000
_BLOCK = 2**23  # random weights


@dataclass(slots=True)
class Spent:
    """Seconds by what they were spent on, over all threads."""

    seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def timed(self, what: str, function: Any) -> Any:
        """`function`, whose time counts for `what`."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                with self.lock:
                    self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

        return call


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description="Quantize a large random model.")
    parser.add_argument("--shape", choices=_SHAPES, default="0.5b")
    parser.add_argument("--type", dest="kind", default="Q4_K_M")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where the model and the output go")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.folder, prefix="large-") as temporary:
        started = time.perf_counter()
        model = make_model(Path(temporary, "model"), options.shape)
        sys.stdout.write(f"{options.shape}: written in {time.perf_counter() - started:.0f} s\n")
        sys.stdout.write(quantized(model, Path(temporary, "out.gguf"), options.kind, options.threads))
    return 0


def make_model(folder: Path, shape: str) -> Path:
    """A Hugging Face checkpoint in bfloat16, a file for each layer."""
    layers, hidden, heads, kv_heads, wide = _SHAPES[shape]
    make_hf(folder, layers=1, hidden=64)
    (folder / "model.safetensors").unlink()
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": hidden // heads,
        "num_key_value_heads": kv_heads, "intermediate_size": wide, "vocab_size": _VOCABULARY,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    kv = hidden // heads * kv_heads
    block = random_bits()
    files = {"outside": {"model.embed_tokens": (_VOCABULARY, hidden), "lm_head": (_VOCABULARY, hidden)}}
    files["outside"] |= {"model.norm": (hidden,)}  # type: ignore[dict-item]
    for i in range(layers):
        parts = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        files[f"layer-{i}"] = {f"model.layers.{i}.{name}": shape_ for name, shape_ in parts.items()}  # type: ignore[misc]
    index: dict[str, str] = {}
    for number, (_, tensors) in enumerate(files.items(), 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        write_safetensors(folder / file, tensors, block)
        index |= {f"{name}.weight": file for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def random_bits() -> Any:
    """Gaussian weights as the bits of bfloat16."""
    weights = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * np.float32(0.02)
    return (weights.view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]], block: Any) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, shape in enumerate(tensors.values()):
            scaled = np.where(block & 0x7F80 > 0x0400, block - 0x80 * (number % 4), block).astype(np.uint16)
            left = int(np.prod(shape))
            while left:
                part = scaled[:left]
                file.write(part.data)
                left -= part.size


def quantized(model: Path, out: Path, kind: str, threads: int) -> str:
    """Quantize, and say what it took."""
    for type_ in ("Q4_K", "Q6_K", "Q3_K", "Q5_K", "Q2_K"):
        if type_[:2] == kind[:2] or type_ == "Q6_K":
            kernel(type_, False)  # compiled beforehand, as after the first run on a machine
    spent = Spent()
    source = open_checkpoint(model)
    vocabulary = read_vocabulary(model, source.config)
    finished = 0.0

    def progress(_: converter.Progress) -> None:
        nonlocal finished
        finished = time.perf_counter()

    with measured(spent, source), sampled() as peaks:
        started = time.perf_counter()
        report = converter.write_gguf(source, vocabulary, out, kind, threads=threads, progress=progress)
        wall, sync = time.perf_counter() - started, time.perf_counter() - finished
    seconds = spent.seconds
    conversion = seconds["block"] - seconds["read"] - seconds["quantize"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = [
        f"{report.parameters / 1e9:.2f}G weights to {kind}, {report.size:,} bytes, {threads} threads",
        f"wall {wall:.1f} s ({wall / 60:.2f} minutes), {report.parameters / 1e6 / wall:.0f}M weights a second",
        f"peak resident {peak / 1024:.0f} MiB with mapped files; anonymous at most {max(peaks) / 2**20:.0f} MiB",
        "seconds over all workers: "
        f"waiting for the turn to read and reading {seconds['read']:.1f}, to float32 and permuting {conversion:.1f}, "
        f"checking, packing and checking {seconds['quantize']:.1f} (of it packing {seconds.get('pack', 0):.1f})",
        f"seconds of the writer: waiting for workers {seconds['wait']:.1f}, "
        f"writing {wall - sync - seconds['wait']:.1f}, final flush to disk {sync:.1f}",
        *report.kernels,
    ]
    return "\n".join(lines) + "\n"


def anonymous() -> int:
    """Bytes of this process's own memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@contextmanager
def sampled() -> Iterator[list[int]]:
    """`anonymous` as it is, and then twenty times a second until the block ends."""
    seen, done = [anonymous()], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            seen.append(anonymous())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@contextmanager
def measured(spent: Spent, source: Any) -> Iterator[None]:
    """Count the time of each step of the converter."""

    def chosen(weights: Any) -> Any:
        found = choose_kernels(weights)
        return {key: type(item)(spent.timed("pack", item.pack), item.note) for key, item in found.items()}

    read = type(source).read
    with (
        patch.object(type(source), "read", _method(spent, "read", read)),
        patch.object(converter, "choose_kernels", chosen),
        patch.object(converter, "quantize_rows", spent.timed("quantize", kquants.quantize_rows)),
        patch.object(converter._Pipeline, "_pack", _method(spent, "block", converter._Pipeline._pack)),
        patch.object(Future, "result", _method(spent, "wait", Future.result)),
    ):
        yield


def _method(spent: Spent, what: str, function: Any) -> Any:
    timed = spent.timed(what, function)

    def call(self: Any, *arguments: Any) -> Any:
        return timed(self, *arguments)

    return call


if __name__ == "__main__":
    sys.exit(main())
