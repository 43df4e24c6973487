"""The benchmarks' table and the maker of their model; the measurements themselves are run by hand."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from benchmarks.models import LLAMA_160M, Model, Shape, random_model, words
from benchmarks.table import Row, markdown, write

TINY = Shape("tiny-random", embedding=256, layers=1, heads=4, feed_forward=512, vocabulary=512)


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("no goal", 1.0, "s"), None),
        (Row("skipped", None, at_most=1.0), None),
        (Row("the value counts", 0.3, "s", at_most=0.2), False),
        (Row("the limit itself is met", 0.2, "s", at_most=0.2), True),
        (Row("the ratio counts", 90.0, "tokens/s", 100.0, ratio=0.9, at_least=0.98), False),
        (Row("a ratio at least", 99.0, "tokens/s", 100.0, ratio=0.99, at_least=0.98), True),
    ],
)
def test_a_goal_is_about_the_ratio_where_there_is_one(row: Row, met: bool | None) -> None:
    assert row.ok is met


def test_the_table_shows_values_peers_ratios_and_goals() -> None:
    rows = [
        Row("decode", 171.4, "tokens/s", 172.0, "bare loop", 0.9965, at_least=0.98),
        Row("prompt", 0.61, "s", at_most=0.5, note="slow"),
        Row("help", None, note="skipped"),
    ]
    head, line, *body = markdown(rows).splitlines()
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in body]
    assert cells == [
        ["decode", "171 tokens/s", "172 tokens/s, bare loop", "0.997", "≥ 0.98", "yes", ""],
        ["prompt", "0.61 s", "", "", "≤ 0.5 s", "no", "slow"],
        ["help", "", "", "", "", "", "skipped"],
    ]
    assert set(line) == {"|", "-", " "}
    assert len({len(text) for text in (head, line, *body)}) == 1


def test_results_are_written_as_markdown_and_json(tmp_path: Path) -> None:
    rows = [Row("decode", 171.4, "tokens/s", 172.0, "bare loop", 0.9965, at_least=0.98)]
    write(tmp_path, rows)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert markdown(rows) in text
    assert all(f"- {name}: {value}" in text for name, value in results["environment"].items())
    assert (results["rows"][0]["measured"], results["rows"][0]["ok"]) == (171.4, True)
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "results.json"}


def test_the_measured_shape_has_160_million_parameters() -> None:
    assert LLAMA_160M.parameters == pytest.approx(160e6, rel=0.02)
    pieces = [text for text, _ in words(LLAMA_160M.vocabulary)]
    assert len(set(pieces)) == LLAMA_160M.vocabulary


def test_a_random_model_has_its_shape_is_quantized_and_loads(tmp_path: Path) -> None:
    path = random_model(TINY, tmp_path)
    tensors = gguf.GGUFReader(path).tensors
    assert sum(int(tensor.n_elements) for tensor in tensors) == TINY.parameters
    assert gguf.GGMLQuantizationType.Q4_K in {tensor.tensor_type for tensor in tensors}
    assert list(tmp_path.iterdir()) == [path]
    engine = Model("tiny", path).endless_engine(context=256)
    assert (engine.vocabulary.size, engine.vocabulary.ends) == (TINY.vocabulary, frozenset())
    assert b"".join(map(engine.piece, engine.tokenize("baba boko"))) == b" baba boko"
    engine.close()


def test_a_random_model_is_made_once(tmp_path: Path) -> None:
    made = tmp_path / f"{TINY.name}-q4_k_m.gguf"
    made.write_bytes(b"made before")
    assert random_model(TINY, tmp_path) == made
    assert made.read_bytes() == b"made before"
