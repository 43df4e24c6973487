"""The memory plan against what really happens: predicted and measured growth of the process, on the CPU.

    python -m benchmarks.memory            three shapes x three contexts, f16; and q8_0 once each

Measured is the peak resident memory (VmHWM: pages of the model's file, and all else) of a process of its own that loads
the model as the program does, fills its context with copies of a batch of 512 tokens, and evaluates one more batch,
less what the process had before: what a batch needs grows with the history. The models have weights of zeros: memory
does not care. Linux only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np

from benchmarks.models import RUNS, words
from benchmarks.table import Row, markdown
from koala_local.models.devices import this_machine
from koala_local.models.gguf_header import read_header
from koala_local.models.gguf_types import TENSOR_TYPES
from koala_local.models.memory import Choice, estimate
from koala_local.models.shape import read_shape
from tests.gguf_maker import vocabulary

_CONTEXTS = (1024, 2048, 4096)
_WITHIN = 0.05
_BATCH = 512


@dataclass(frozen=True, slots=True)
class _Shape:
    """A LLaMA in the Q4_K_M mix."""

    name: str
    embedding: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    words: int


_SHAPES = (
    _Shape("160M", 768, 12, 12, 12, 3072, 32_000),
    _Shape("1.1B, grouped KV", 2048, 22, 32, 4, 5632, 32_000),
    _Shape("4 layers as wide as 7B's", 4096, 4, 32, 32, 11_008, 32_000),
)


def run(quick: bool) -> list[Row]:
    """A row for each shape and context: the measured bytes, the predicted ones, and their ratio."""
    rows, machine = [], this_machine()
    RUNS.mkdir(parents=True, exist_ok=True)
    for shape in _SHAPES[:1] if quick else _SHAPES:
        with TemporaryDirectory(dir=RUNS) as folder:
            path = _make(Path(folder, "zeros.gguf"), shape)
            header = read_header(path)
            numbers = read_shape(header, header.tensors)
            for context, kv_type in [*((context, "f16") for context in _CONTEXTS), (_CONTEXTS[-1], "q8_0")]:
                measured = _in_child(path, context, kv_type)
                predicted = estimate(numbers, machine, Choice(context, kv_type, 0)).peak
                rows.append(_row(f"{shape.name}, context {context}, {kv_type}", measured, predicted))
    return rows


def _row(name: str, measured: int, predicted: int) -> Row:
    ratio = predicted / measured
    value, peer = measured / 1e6, predicted / 1e6
    return Row(f"memory, {name}", value, "MB", peer, "predicted", ratio, 1 - _WITHIN, 1 + _WITHIN)


def _make(path: Path, shape: _Shape) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(max(_CONTEXTS))
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape.embedding // shape.heads)
    tokens = vocabulary(words(shape.words - len(vocabulary())))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([type_ for _, _, type_ in tokens])
    _add_tensors(writer, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: gguf.GGUFWriter, shape: _Shape) -> None:
    def matrix(name: str, rows: int, columns: int, type_: str = "Q4_K") -> None:
        _, values, size = next(entry for entry in TENSOR_TYPES.values() if entry[0] == type_)
        data = np.zeros((rows, columns // values * size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[type_])

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.embedding, dtype=np.float32))

    wide, kv = shape.embedding, shape.embedding // shape.heads * shape.kv_heads
    matrix("token_embd", shape.words, wide)
    norm("output_norm")
    matrix("output", shape.words, wide, "Q6_K")
    for layer in range(shape.layers):
        eighth, block = shape.layers // 8, f"blk.{layer}"
        better = layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", wide, wide)
        matrix(f"{block}.attn_k", kv, wide)
        matrix(f"{block}.attn_v", kv, wide, "Q6_K" if better else "Q4_K")
        matrix(f"{block}.attn_output", wide, wide)
        matrix(f"{block}.ffn_gate", shape.feed_forward, wide)
        matrix(f"{block}.ffn_up", shape.feed_forward, wide)
        matrix(f"{block}.ffn_down", wide, shape.feed_forward, "Q6_K" if better else "Q4_K")


def _in_child(path: Path, context: int, kv_type: str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", str(path), str(context), kv_type]
    return int(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def _measure(path: Path, context: int, kv_type: str) -> int:
    """Bytes that this process grows by at its peak."""
    from koala_local.engine.llama import LlamaEngine, Placement

    before = _status("VmRSS")
    engine = LlamaEngine(path, "benchmark", Placement(context, 0, kv_type))
    ids, last = [7] * _BATCH, context // _BATCH - 1
    engine.evaluate(ids, slot=0, position=0)
    engine.save(0, ids, path.with_suffix(".kv"))
    for slot in range(1, last):
        engine.load(slot, path.with_suffix(".kv"))
    engine.evaluate(ids[:-1], slot=last, position=0)
    engine.evaluate((9,), slot=last, position=_BATCH - 1)
    peak = _status("VmHWM")
    engine.close()
    return peak - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
    else:
        print(markdown(run(quick=False)), end="")
