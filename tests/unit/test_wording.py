from __future__ import annotations

import pytest

from koala_local.wording import as_markdown, duration, first_line, first_of, short_number, size


@pytest.mark.parametrize(
    ("count", "hundredths", "tenths"),
    [
        (0, "0.0 MB", "0 MB"),
        (3_490_000, "3.5 MB", "3 MB"),
        (99_900_000, "99.9 MB", "100 MB"),
        (100_000_000, "0.10 GB", "100 MB"),
        (7_870_000_000, "7.87 GB", "7.9 GB"),
    ],
)
def test_bytes(count: float, hundredths: str, tenths: str) -> None:
    assert (size(count), size(count, 1)) == (hundredths, tenths)


def test_numbers_and_times() -> None:
    assert [short_number(count) for count in (13e9, 5.51e6, 1500, 12)] == ["13 B", "5.51 M", "1.5 k", "12"]
    assert [duration(seconds) for seconds in (0.34, 42, 3540, 3600)] == ["0.3 s", "42 s", "59.0 min", "1.0 h"]


def test_what_comes_from_elsewhere_is_no_markup() -> None:
    assert as_markdown("<a>\n# b [c](d)\x1b|") == "\\<a\\> \\# b \\[c\\](d) \\|"
    assert as_markdown("x*y", 2) == "x\\*"


def test_lists_and_errors() -> None:
    assert first_of(["a", "b"], 2) == "a, b" and first_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert first_line(ValueError("\n what it is\nmore")) == "what it is"
    assert first_line(KeyError()) == "KeyError" and len(first_line(ValueError("x" * 999), 9)) == 9
