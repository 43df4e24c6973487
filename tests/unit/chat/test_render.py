from __future__ import annotations

import io
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from koala_local.chat.render import ReplyView

REPLY = """\
# Eucalyptus and *sleep*

Koalas rest **eighteen** hours, see `sleep(18)`, and [this page](http://example.com/a?b=c "long title"), [red]not
markup[/red], [link=http://example.com]nor this[/link], <b>bold</b> & :smile: 日本語のテキスト 🐨 and <http://example.org>.

They eat:
- leaves of `eucalyptus`
- more leaves, and of these so many that the line must be wrapped somewhere
  - young ones

  - old ones
- nothing else
1. First

2. Second
   ```sh
   echo "inside a list" | cat
   ```
10. Tenth

```python title=example
def fib(n: int) -> int:
    '''A docstring
    over lines.'''
    return n if n < 2 else fib(n - 1) + fib(n - 2)  # a comment that is longer than any of the two screens is wide

print(fib(10))
```
After the code, at once.

| Animal | Food | Weight |
|--------|:----:|-------:|
| Wombat | grass, roots, and the bark of several kinds of trees | 30 kg |
| Quokka | shrubs | 3 kg | surplus |

| Animal | Food | Weight |
|--------|:----:|-------:|
| Wombat | grass, roots, and the bark of several kinds of trees | 30 kg |

> Quoted words
> over lines

***

Answer:
42

[label]: http://example.net "defined"

Title
=====

    indented = code

<div class="raw">html</div>

![picture](http://example.com/p.png)

> > > > > > > > > > > > > > > > > > > > > > > > deeply quoted

~~struck~~ and the very last words, without a newline"""


class Shown:
    """A view on a make-believe terminal with a clock that is set by hand."""

    def __init__(self, width: int = 80, height: int = 24, **options: Any) -> None:
        self.now = 0.0
        self.file = io.StringIO()
        self.width, self.height = width, height
        settings: dict[str, Any] = {"force_terminal": True, "color_system": "256", "_environ": {}, **options}
        self.console = Console(
            file=self.file,
            width=width,
            height=height,
            get_time=lambda: self.now,
            **settings,
        )
        self.view = ReplyView(self.console)

    def feed(self, pieces: Iterable[str], seconds: float = 0.03) -> None:
        for piece in pieces:
            self.view.feed(piece)
            self.now += seconds

    @property
    def output(self) -> str:
        return self.file.getvalue()

    def screen(self) -> pyte.HistoryScreen:
        screen = pyte.HistoryScreen(self.width, self.height, history=10_000, ratio=0.5)
        pyte.Stream(screen).feed(self.output.replace("\n", "\r\n"))
        return screen

    def rows(self) -> list[str]:
        """All that was ever scrolled out, and the screen."""
        screen = self.screen()
        past = ["".join(line[x].data for x in range(self.width)) for line in screen.history.top]
        below = screen.display[screen.cursor.y + 1 :]
        assert not any(row.strip() for row in below), "left over from an earlier drawing"
        return [row.rstrip() for row in [*past, *screen.display[: screen.cursor.y + 1]]]


def tokens(text: str) -> list[str]:
    return re.findall(r"\s*\S{1,4}|\s+", text)


def at_once(text: str, width: int, height: int = 24) -> list[str]:
    shown = Shown(width, height)
    with shown.view:
        shown.feed([text])
    return shown.rows()


def letters_and_digits(text: str) -> Counter[str]:
    return Counter(filter(str.isalnum, text))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("seconds", [0, 0.03, 1])
def test_every_word_is_on_the_screen_and_nothing_else(width: int, seconds: float) -> None:
    shown = Shown(width)
    with shown.view:
        shown.feed(tokens(REPLY), seconds)
    rows = shown.rows()
    # A row that is full may break a word: a code line is as long as it is.
    text = "".join(row if len(row) == width else row + "\n" for row in rows)
    missing = [word for word in words(REPLY) if word not in text]
    assert not missing
    assert len(words(text)) <= len(words(REPLY)) + 3  # the wide table is drawn once more below the odd one
    assert rows == at_once(REPLY, width)
    assert rows[-1] == ""
    assert shown.screen().cursor.x == 0


MARKS = [
    *"-*#>`~=_ \n1.)([]<!a",
    "\n\n",
    "\n",
    "\n",
    "- a",
    "  - b",
    "1. c",
    "```",
    "```py\n",
    "~~~",
    "# h",
    "**",
    "    ",
]
WORDS = ["word ", "and more words ", "\t", "---", "===", "> q", "日本", "42", "10. ", "<b>", "[x](y)", "http://a.b "]
TABLES = ["| x | y |", "\n|--|--|\n", "|", "|-"]
# Lines of marks and little else, so that many a list item, heading and quote is empty.
LINES = st.lists(
    st.lists(st.sampled_from(["1.", "-", "#", "##", ">", "a", "23.", "007)", "5)", "```", "**b**", " "]), max_size=4),
    max_size=8,
).map(lambda lines: list("\n".join(map(" ".join, lines))))


# No tables: a line that could be a list item or a table's head is one or the other, as more or less of it is known.
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(MARKS + WORDS), max_size=40) | LINES, st.integers(8, 30), st.sampled_from([0.0, 0.04, 1])
)
@example(["para", "\n", "#", "hash"], 20, 1)
@example(["para", "\n", "-", " ", "item"], 20, 1)
@example(["para", "\n", "***", "bold", "***"], 20, 1)
@example(["```", "py", "`", " x", "```", " y"], 20, 1)
@example(["1. a", "\n", "1. b", "\n\n", "1. c"], 20, 1)
def test_a_stream_ends_as_the_whole_would(pieces: list[str], width: int, seconds: float) -> None:
    shown = Shown(width, 8)
    with shown.view:
        shown.feed(pieces, seconds)
    assert shown.rows() == at_once("".join(pieces), width, 8)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(MARKS + WORDS + TABLES), max_size=40) | LINES, st.sampled_from([0.0, 0.04, 1]))
def test_no_letter_and_no_digit_is_lost(pieces: list[str], seconds: float) -> None:
    shown = Shown(30, 8)
    with shown.view:
        shown.feed(pieces, seconds)
    assert not letters_and_digits("".join(pieces)) - letters_and_digits("".join(shown.rows()))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(1, 60))
def test_any_text_can_be_shown(text: str, width: int) -> None:
    shown = Shown(width)
    with shown.view:
        shown.feed(text, 0.05)
    left = re.sub(r"\x1b\[[0-9;?]*[AJKhlm]|\r", "", shown.output)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", left)


def test_a_finished_block_is_never_written_again() -> None:
    shown = Shown()
    blocks = [f"First{n} paragraph of some words.\n\n- item{n}\n\n```\ncode{n}\n```\n\n" for n in range(20)]
    for n, block in enumerate(blocks):
        before = len(shown.output)
        shown.feed(tokens(block), 1)
        later = shown.output[before:]
        assert not re.search(rf"(First|item|code){n - 1}\b.*First{n}\b.*(First|item|code){n - 1}\b", later, re.DOTALL)
        assert not any(f"{word}{n - 2}" in later for word in ("First", "item"))
    shown.view.close()
    text = "\n".join(shown.rows())
    assert [text.count(f"First{n} ") for n in range(20)] == [1] * 20


@pytest.mark.parametrize("seconds", [0.01, 0.05])
def test_what_is_written_grows_with_the_reply_only(seconds: float) -> None:
    def written(times: int) -> tuple[int, int]:
        shown = Shown()
        text = (REPLY + "\n\n") * times
        with shown.view:
            shown.feed(tokens(text), seconds)
        return len(shown.output), len(text)

    small, _ = written(2)
    large, size = written(8)  # about 3 500 tokens
    assert large < 4.4 * small
    assert large < 25 * size


def test_code_is_printed_line_by_line_and_only_once() -> None:
    shown = Shown()
    lines = [f'    value{n} = "text{n}"\n' for n in range(60)]
    shown.feed(["```python\n", "def f():\n", *lines], 1)
    assert "\x1b[J" not in shown.output
    assert "\x1b[A" not in shown.output
    assert [shown.output.count(f"value{n} ") for n in range(60)] == [1] * 60
    shown.view.close()
    assert [row for row in shown.rows() if row][1:] == ["def f():", *[line.rstrip() for line in lines]]


def test_code_keeps_its_lines_and_its_colours_over_them() -> None:
    shown = Shown(40)
    long = "x = '" + "a" * 90 + "'"
    with shown.view:
        shown.feed(tokens(f"```python\n'''doc\ninside def\n'''\n{long}\n```\n"), 1)
    assert long in re.sub(r"\x1b\[[0-9;]*m", "", shown.output)  # not cut where the screen ends
    assert "\x1b[32minside def" in shown.output
    assert not re.search(r"\x1b\[[0-9;]*\b4[0-9]m|48;", shown.output)  # no background


def test_no_line_is_padded() -> None:
    shown = Shown()
    with shown.view:
        shown.feed([REPLY])
    assert not re.search(r" (\x1b\[[0-9;]*[mK])*\n", shown.output)


def test_one_code_block_after_another() -> None:
    text = "```\none\ntwo\n```\n```\nthree\n```\nfour\n"
    shown = Shown()
    with shown.view:
        shown.feed(tokens(text), 1)
    assert shown.rows() == at_once(text, 80)
    assert [row for row in shown.rows() if row.isalpha()] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("width", range(24, 72))
def test_a_table_never_cuts_a_word(width: int) -> None:
    table = "| Animal | Food |\n|---|---|\n| Wombat | grass and barkoftreesbytheriver |\n| Quokkaorquokkas | shrubs |\n"
    assert not Counter(words(table)) - Counter(words("\n".join(at_once(table, width))))


def test_list_items_keep_the_numbers_the_model_wrote() -> None:
    shown = at_once("3. c\n4. d\n10. j\n\ntext\n\n1. a\n1. b", 80)
    assert shown == [" 3. c", " 4. d", " 10. j", "", "text", "", " 1. a", " 1. b", ""]
    assert at_once("1986. A great year", 80) == [" 1986. A great year", ""]
    assert at_once("00007. bond", 80) == [" 00007. bond", ""]
    assert at_once("9) x\n   1. y\n   20. z", 80) == [" 9) x", "     1. y", "     20. z", ""]


EMPTY = {
    **{text: [text] for text in ["23.", "1986.", "5)", "-", "*", "+", "#", "## ##", ">", "> >", "1. 2.", "> - 23."]},
    "10.\n\n11.": ["10.", "", "11."],
    "1.\n2. b": ["1.", " 2. b"],
    "- a\n-\n- b": [" • a", "-", " • b"],
    "- # a\n  1.\n  2. b\n- c": ["- # a", "  1.", "  2. b", " • c"],
    "> a\n> #\n\n>\n\nb": ["> a", "> #", "", ">", "", "b"],
}


@pytest.mark.parametrize("text", EMPTY)
def test_an_empty_item_heading_or_quote_is_shown_as_it_was_written(text: str) -> None:
    assert at_once(text, 80) == [*EMPTY[text], ""]
    shown = Shown()
    shown.feed([*text, "\n"], 1)
    assert shown.rows() == EMPTY[text]
    shown.view.close()
    assert shown.rows() == [*EMPTY[text], ""]


def test_long_numbers_leave_no_text_without_room() -> None:
    for depth in range(1, 12):
        text = "123456789. " * depth + "word"
        assert not Counter(words(text)) - Counter(words("\n".join(at_once(text, 60))))


def test_a_block_that_shrinks_leaves_nothing_behind() -> None:
    shown = Shown(16)
    shown.feed(["aaaa bbb **cc ddd"], 1)
    assert shown.rows() == ["aaaa bbb **cc", "ddd"]
    shown.feed(["**"], 1)
    assert shown.rows() == ["aaaa bbb cc ddd"]


def test_a_finished_line_is_written_with_wrapping_on() -> None:
    # A live line is cut where a terminal takes a character for wider than it is counted here; a finished one is not.
    shown = Shown()
    shown.feed(["⚠️ words\nmore"], 1)
    assert shown.output.endswith("\x1b[?7h")
    shown.view.close()
    assert "words" in shown.output.rpartition("\x1b[?7h")[2]


def test_only_text_that_changed_is_written() -> None:
    shown = Shown()
    shown.feed(["one two three " * 20, "\nfour"], 1)
    before = len(shown.output)
    shown.feed([" five"], 1)
    assert shown.output[before:].count("five") == 1
    assert "one" not in shown.output[before:]


def test_a_tail_taller_than_the_screen_shows_its_end_and_is_whole_at_last() -> None:
    text = "above\n\n" + "\n".join(f"line{n}" for n in range(40))
    shown = Shown(40, 10)
    shown.feed(tokens(text), 1)
    rows = shown.rows()
    assert rows[-1] == "line39"
    assert len(rows) <= 11
    shown.view.close()
    assert shown.rows() == ["above", "", *[f"line{n}" for n in range(40)], ""]


def test_nothing_is_drawn_more_than_fifteen_times_a_second() -> None:
    class Counted(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            Counted.writes += bool(text)
            return super().write(text)

    shown = Shown()
    shown.console.file = Counted()
    shown.feed(["word "] * 3000, 0.001)
    assert 30 <= Counted.writes <= 50


def test_a_list_marker_is_not_taken_for_an_underline_while_it_is_typed() -> None:
    shown = Shown()
    shown.feed(["These:", "\n", "-", " ", "one"], 1)
    assert "\x1b[35;4m" not in shown.output
    assert "\x1b[4;35m" not in shown.output
    assert shown.rows() == ["These:", "", " • one"]


def test_a_line_of_marks_costs_no_more_than_its_length() -> None:
    shown = Shown()
    began = time.perf_counter()
    with shown.view:
        shown.feed(["- " * 20_000, "-" * 20_000, "x", "|" * 20_000, "x"], 1)
    assert time.perf_counter() - began < 5


def test_links_show_their_address_as_text_only() -> None:
    shown = Shown()
    with shown.view:
        shown.feed(["see [here](http://example.com/%1B%5D52;c;a%07) and <http://a.b/%1B[31m>"])
    assert "\x1b]" not in shown.output
    assert shown.rows()[0] == "see here (http://example.com/%1B%5D52;c;a%07) and http://a.b/%1B[31m"


HOSTILE = [
    "\x1b]52;c;aGk=\x07",
    "\x9b31m",
    "&#27;]52;c;aGk=&#7;",
    "&#x202e;abc",
    "<http://a/%1b[2J>",
    "`\x1b[2J`",
    "```\x1b[2J\n\x1b]0;t\x07\n```",
    "```x&#27;[2J\n```",
    "[a](b&#155;2J)",
    '[a](b "&#27;c")',
    "| \x1b[2J |\n|---|\n| &#27;c |\n",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("cut", [1, 3, 100])
def test_no_escape_reaches_the_terminal(text: str, cut: int) -> None:
    shown = Shown()
    with shown.view:
        shown.feed([text[i : i + cut] for i in range(0, len(text), cut)], 1)
    left = re.sub(r"\x1b\[[0-9;]*[AKm]|\x1b\[J|\x1b\[\?7[hl]|\r", "", shown.output)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", left)


def test_an_error_leaves_the_text_and_a_fresh_line() -> None:
    shown = Shown()

    def interrupted() -> Iterator[str]:
        yield from ["half a rep", "ly **and"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), shown.view:
        shown.feed(interrupted(), 0)
    assert shown.rows() == ["half a reply **and", ""]
    before = shown.output
    shown.view.close()
    assert shown.output == before


def test_an_empty_reply_writes_nothing() -> None:
    shown = Shown()
    with shown.view:
        shown.feed(["", "\x1b[31m"])
    assert shown.output == ""


def test_no_colour() -> None:
    shown = Shown(_environ={"NO_COLOR": "1"})
    with shown.view:
        shown.feed(tokens(REPLY))
    assert not re.search(r"\x1b\[[0-9;]*\b[349][0-9]\b[0-9;]*m", shown.output)
    assert shown.rows() == at_once(REPLY, 80)


@pytest.mark.parametrize(
    "options",
    [{"_environ": {"TERM": "dumb"}, "color_system": None}, {"force_terminal": False}],
    ids=["dumb", "not a terminal"],
)
def test_plain_text_streams_as_it_is(options: dict[str, Any]) -> None:
    shown = Shown(40, **options)
    seen = []
    with shown.view:
        for piece in ["[red]**x**[/red] :smile:\t", "a" * 100, "\x1b[3", "1m\x07", "\n", "- 日本"]:
            shown.view.feed(piece)
            seen.append(len(shown.output))
    assert shown.output == "[red]**x**[/red] :smile:\t" + "a" * 100 + "\n- 日本\n"
    assert seen[:2] == [25, 125]


def test_a_terminal_without_utf8_gets_what_it_can_show() -> None:
    shown = Shown()
    raw = io.BytesIO()
    shown.console.file = io.TextIOWrapper(raw, encoding="latin-1", newline="")
    with ReplyView(shown.console) as view:
        view.feed("- é 日\n")
    assert raw.getvalue() == "- é ?\n".encode("latin-1")


def test_feeding_is_cheap_and_a_refresh_does_not_grow_with_the_reply() -> None:
    shown = Shown()
    began = time.perf_counter()
    shown.feed([" word"] * 2000, 0)
    assert (time.perf_counter() - began) / 2000 < 200e-6  # measured about 1 microsecond

    def cost(paragraphs: int) -> float:
        best = float("inf")
        for _ in range(paragraphs):
            began = time.perf_counter()
            shown.feed(["\n\nA paragraph", " of several", " words."], 1)
            best = min(best, time.perf_counter() - began)
        return best

    early = cost(10)
    cost(150)
    assert cost(10) < 4 * early
