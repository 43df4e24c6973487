"""What a report counts, and how it is shown."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from koala_local.finetune.data import views
from koala_local.finetune.data.examples import Example, from_line, hold_out, is_held_out, to_line
from koala_local.finetune.data.mix import LISTED, Tally
from koala_local.finetune.data.raw_files import Skipped
from koala_local.finetune.data.recipe import Recipe, SourceRules
from koala_local.finetune.data.report import EDGES, length_report, source_report, whole_report, write_plots
from koala_local.finetune.data.sources import SOURCES
from koala_local.finetune.data.views import dialogue_view, report_view
from rich.console import Console

from koala_local import console
from koala_local.dialogue import Dialogue, Turn


def report(*, test_sets: bool = True, unhelpful: int = 0, missing: Sequence[str] = ()) -> dict[str, Any]:
    tally = Tally(rows=10, examples=8, kept=5, held_out=1, turns=7, unhelpful=unhelpful)
    tally.skip(Skipped("a.json[3]", "not valid JSON"))
    tally.remove("a.json[4]", "near")
    lengths = np.array([3, 9, 40, 40, 70_000])
    source = source_report(SOURCES["webgpt"], tally, lengths, 50, [{"file": "a.json", "sha256": "0"}], missing)
    sets = [{"file": "t.jsonl", "sha256": "1", "queries": 2}] if test_sets else []
    return whole_report(Recipe("mine", {"webgpt": SourceRules()}), {"webgpt": source}, sets, lengths, "t.model")


def test_lengths() -> None:
    found = length_report(np.array([1, 8, 9, 15, 16, 100, 1 << 20]))
    assert sum(found["histogram"]) == 7
    assert found["histogram"][:2] == [4, 1] and found["histogram"][-1] == 1  # the ends hold what is beyond them
    assert (found["quantiles"]["0.5"], found["longest"]) == (15, 1 << 20)
    assert length_report(np.array([], np.int64))["histogram"] == [0] * len(EDGES)


def test_totals() -> None:
    total = report()["total"]
    assert (total["rows"], total["kept"], total["skipped"], total["tokens"]) == (10, 5, 1, 70_092)
    assert total["removed"]["near"] == 1
    assert report()["sources"]["webgpt"]["published"] == 20_000
    assert report(unhelpful=2)["sources"]["webgpt"]["published"] == 40_000  # of pairs, both are counted


def test_the_view_has_it_all() -> None:
    text = " ".join(console.as_text(report_view(report())).split())
    assert "WebGPT comparisons 20,000 10 8 5 1 7" in text
    assert "Held against the test sets t.jsonl (2 queries)." in text
    assert "Unusable, not valid JSON, 1: a.json[3]." in text
    assert "NOT DECONTAMINATED" in console.as_text(report_view(report(test_sets=False)))


def test_missing_files_are_named() -> None:
    text = " ".join(console.as_text(report_view(report(missing=["a.jsonl", "b.jsonl"]))).split())
    assert "WebGPT comparisons was read without these of its published files: a.jsonl, b.jsonl." in text
    old = report()
    del old["sources"]["webgpt"]["missing"]  # of a corpus that an earlier version made
    for found in (report(), old):
        assert "published files" not in console.as_text(report_view(found))


def test_plain_text_is_said_not_to_be_held_against_test_sets() -> None:
    found = report()
    found["sources"]["webgpt"]["texts"] = 1234
    assert "plain text, 1,234 documents" in console.as_text(report_view(found))
    assert "plain text" not in console.as_text(report_view(report()))


def test_no_line_is_too_wide() -> None:
    assert max(map(len, console.as_text(report_view(report())).splitlines())) <= 100


def test_plots_of_any_report(tmp_path: Path) -> None:
    assert len(write_plots(report(), tmp_path)) == 3
    empty = whole_report(Recipe("none", {}), {}, [], np.array([], np.int64), "t")
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in write_plots(empty, tmp_path))


def test_lists_are_short_and_counts_are_not() -> None:
    tally = Tally()
    for number in range(3 * LISTED):
        tally.skip(Skipped(f"a:{number}", "a tie"))
        tally.remove(f"b:{number}", "keyword")
    assert (tally.skipped["a tie"], tally.removed["keyword"]) == (3 * LISTED, 3 * LISTED)
    assert (len(tally.skipped_rows), len(tally.removed_rows)) == (LISTED, LISTED)


def test_brackets_or_colours() -> None:
    runs = [("<s> USER: hi GPT:", False), (" hello</s>", True)]
    assert dialogue_view(runs, coloured=False).plain == "<s> USER: hi GPT:⟦ hello</s>⟧"
    coloured = dialogue_view(runs, coloured=True)
    assert coloured.plain == "<s> USER: hi GPT: hello</s>"
    assert [str(span.style) for span in coloured.spans] == ["bright_black", "green"]


def test_a_report_on_a_narrow_terminal_loses_no_number() -> None:
    found = report()
    page = io.StringIO()
    Console(file=page, width=40).print(report_view(found))
    text = page.getvalue()
    assert max(map(len, text.splitlines())) <= 40 and "…" not in text
    numbers = set(re.findall(r"[\d,]+\d", console.as_text(report_view(found))))
    assert {"70,000"} <= numbers <= set(re.findall(r"[\d,]+\d", text))


def test_lines_hold_any_text() -> None:
    for text in ("a\u2028b\nc\x85", '", "held_out": true}', "\x00\x1b", '{"user": ', '"text": "helpful": false', "é😀"):
        example = Example(Dialogue((Turn(text, text, False), Turn("x", text)), text), "hh", "a:1")
        line = to_line(example)
        assert len(line.splitlines()) == 1 or "\x85" in text
        assert "\n" not in line and from_line(line) == example == from_line(hold_out(line))
        assert is_held_out(hold_out(line)) and not is_held_out(line)
        assert line.count('{"user": ') == 2 and '"text": ' not in line
        plain = Example(text, "mine", "a:1")
        line = to_line(plain)
        assert "\n" not in line and from_line(line) == plain == from_line(hold_out(line))
        assert is_held_out(hold_out(line)) and not is_held_out(line)
        assert (line.count('"text": '), line.count('{"user": '), line.count('"helpful": false')) == (1, 0, 0)


def test_a_build_that_nobody_watches_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "TELL_S", 0.0)
    with views.telling() as tell:
        tell("alpaca", 1000, None)
        tell("tokens", 3, 7)
    assert capsys.readouterr().err == "building alpaca: 1,000\nbuilding tokens: 3 of 7\n"
