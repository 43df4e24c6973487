"""Tables of plain text."""

from __future__ import annotations

import pytest

from koala_local import console
from koala_local.models import page

ROWS = [["", "TYPE", "SIZE"], ["->", "Q4_K_M", "3.5 MB"], ["", "Q8_0", "12.0 MB"]]


def test_columns_are_aligned() -> None:
    assert page.columns(ROWS) == "    TYPE    SIZE\n->  Q4_K_M  3.5 MB\n    Q8_0    12.0 MB"


def test_where_they_do_not_fit_each_cell_has_its_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (console, page):
        monkeypatch.setattr(module, "columns_of", lambda _: 18)
    assert page.columns(ROWS) == "->, type Q4_K_M,\n  size 3.5 MB\ntype Q8_0, size\n  12.0 MB"
