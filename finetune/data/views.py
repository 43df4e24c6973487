"""What `koala data` shows: the progress of a build, the table of a report, an example as the model is trained on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from koala_local import console

from .mix import REASONS, Tell

_WIDE = 1000  # columns, more than any table takes
SHOWN = 3  # rows of each source and kind
_NOT_HELD = "NOT DECONTAMINATED: no test set was given (--test-set FILE); evaluations may be on training data."
_LABELS = {
    "keyword": "keyword",
    "language": "not English",
    "contaminated": "in a test set",
    "exact": "repeated",
    "near": "nearly repeated",
}


def report_view(report: Mapping[str, Any]) -> RenderableType:
    """Counts beside the published ones, lengths, and what was left out."""
    tables = (_Fitting(make(report)) for make in (_counts, _lengths, _left_out))
    return Group(*(part for table in tables for part in (table, "")), *_notes(report))


class _Fitting:
    """A table where the terminal is wide enough, else a paragraph for each of its rows."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table
        if terminal.measure(table, options=options.update(max_width=_WIDE)).maximum <= options.max_width:
            yield table
            return
        yield Text(str(table.title), "italic")
        heads = [str(column.header) for column in table.columns]
        for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
            numbers = ", ".join(f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True))
            yield Text.assemble((f"{name}: ", "bold"), numbers)


def _counts(report: Mapping[str, Any]) -> Table:
    table = _table(f"recipe {report['recipe']['name']}", ("published", "rows", "examples", "kept", "held out", "turns"))
    for each in (*report["sources"].values(), report["total"]):
        numbers = [each[key] for key in ("rows", "examples", "kept", "held_out", "turns")]
        published = f"{each['published']:,}" if each["published"] else "-"
        table.add_row(each.get("title", "total"), published, *(f"{number:,}" for number in numbers))
    return table


def _lengths(report: Mapping[str, Any]) -> Table:
    table = _table("tokens", ("all", "trained on", "median", "95 %", "99 %", "longest"))
    for each in (*report["sources"].values(), report["total"]):
        quantiles = each["lengths"]["quantiles"]
        numbers = [each["tokens"], each["trained_tokens"], *(quantiles.get(q, 0) for q in ("0.5", "0.95", "0.99"))]
        numbers.append(each["lengths"]["longest"])
        table.add_row(each.get("title", "total"), *(f"{number:,}" for number in numbers))
    return table


def _left_out(report: Mapping[str, Any]) -> Table:
    table = _table("left out", ("unusable", *(_LABELS[reason] for reason in REASONS)))
    for each in (*report["sources"].values(), report["total"]):
        skipped = each["skipped"] if isinstance(each["skipped"], int) else sum(each["skipped"].values())
        numbers = [skipped, *(each["removed"][reason] for reason in REASONS)]
        table.add_row(each.get("title", "total"), *(f"{number:,}" if number else "-" for number in numbers))
    return table


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("source")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _notes(report: Mapping[str, Any]) -> list[Text]:
    lines = []
    if report["decontaminated"]:
        sets = ", ".join(f"{each['file']} ({each['queries']:,} queries)" for each in report["test_sets"])
        lines.append(Text(f"Held against the test sets {sets}."))
        if texts := sum(each.get("texts", 0) for each in report["sources"].values()):
            lines.append(Text(f"Not held against them, since it asks nothing: plain text, {texts:,} documents."))
    else:
        lines.append(Text(_NOT_HELD, "bold red"))
    for each in report["sources"].values():
        lines += [Text(line) for line in (*_missing(each), *_closest(each), *_skipped(each))]
    return lines


def _missing(source: Mapping[str, Any]) -> list[str]:
    names = ", ".join(source.get("missing", ()))
    return [f"{source['title']} was read without these of its published files: {names}."] if names else []


def _closest(source: Mapping[str, Any]) -> list[str]:
    """The worst of what is in a test set; of a pair one."""
    worst = list({each["row"]: each for each in source["contaminated"]}.values())[:SHOWN]
    return [f"In a test set, BLEU {each['bleu']:.2f}: {each['row']} is close to {each['test_row']}." for each in worst]


def _skipped(source: Mapping[str, Any]) -> list[str]:
    lines = []
    for reason, count in source["skipped"].items():
        rows = [each["row"] for each in source["skipped_rows"] if each["reason"] == reason][:SHOWN]
        more = ", .." if count > len(rows) else ""
        lines.append(f"Unusable, {reason}, {count:,}: {', '.join(rows)}{more}.")
    return lines


def dialogue_view(runs: Sequence[tuple[str, bool]], *, coloured: bool) -> Text:
    """Text that is trained on (True) or only read: in green and grey, or with the former in brackets."""
    text = Text()
    for said, trained in runs:
        if coloured:
            text.append(said, "green" if trained else "bright_black")
        else:
            text.append(f"⟦{said}⟧" if trained else said)
    return text


@contextmanager
def telling() -> Iterator[Tell]:
    """A bar for each part of the work; where no terminal is, a line now and then."""
    with console.progress("building") as step:
        part, before, started = "", 0, 0.0

        def tell(what: str, done: int, total: int | None) -> None:
            nonlocal part, before, started
            now = time.monotonic()
            if what != part:
                part, before, started = what, done, now
            rate = f", {(done - before) / (now - started):,.0f} a second" if now > started + 1 else ""
            step(done, total, f"{what}{rate}")

        yield tell
