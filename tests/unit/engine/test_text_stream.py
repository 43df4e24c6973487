from __future__ import annotations

import time
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from koala_local.engine.text_stream import MAX_SEQUENCE, EscapeFilter, TextStream, one_line, plain

MIXED = "naïve 日本語 漢字かな 👩‍👩‍👧 🇯🇵 e\u0301 \U0001f9a5 end"
STOPS = ["###", "</s>", "終わり", "🐨🐨", "aab", "\n\n"]


def run(pieces: list[bytes], stops: list[str]) -> tuple[str, TextStream]:
    stream = TextStream(stops)
    text = "".join([stream.feed(piece) for piece in pieces]) + stream.finish()
    assert stream.text == text
    return text, stream


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


# What a stop string does, said again in the plainest way: the one complete first, the longest of those.
def expected(data: bytes, stops: list[str]) -> tuple[bytes, bool]:
    for end in range(len(data) + 1):
        ending = [stop.encode() for stop in stops if data[:end].endswith(stop.encode())]
        if ending:
            return data[: end - max(map(len, ending))], True
    return data, False


@pytest.mark.parametrize("stops", [[], STOPS])
def test_every_cut_of_emoji_and_cjk_gives_the_whole_decode(stops: list[str]) -> None:
    data = MIXED.encode()
    assert run([data[i : i + 1] for i in range(len(data))], stops)[0] == MIXED
    for place in range(len(data) + 1):
        assert run([data[:place], data[place:]], stops)[0] == MIXED


def test_no_half_character_is_ever_released() -> None:
    stream = TextStream()
    assert [stream.feed(bytes([byte])) for byte in "é🐨".encode()] == ["", "é", "", "", "", "🐨"]


@given(st.text(), st.lists(st.integers(0, 10_000), max_size=20))
@example("🐨日本", list(range(12)))
def test_text_streams_whole(text: str, places: list[int]) -> None:
    streamed, stream = run(cut(text.encode(), places), [])
    assert streamed == text
    assert (stream.stopped, stream.kept_bytes) == (False, len(text.encode()))


@given(st.binary(max_size=60), st.lists(st.integers(0, 10_000), max_size=20))
@example(b"\xff\xe6\x97", [1, 2])
@example(b"a\xf0\x9f\x90b\xc3", [2, 3, 4])
def test_any_bytes_stream_as_the_whole_decode(data: bytes, places: list[int]) -> None:
    assert run(cut(data, places), [])[0] == data.decode("utf-8", "replace")


def test_an_invalid_byte_does_not_stall() -> None:
    stream = TextStream(STOPS)
    assert [stream.feed(piece) for piece in (b"a\xff", b"b", b"\x80c", b"d")] == ["a\ufffd", "b", "\ufffdc", "d"]


parts = st.one_of(
    st.sampled_from([*STOPS, "#", "##", "a", "b", "</", "終", "🐨", "é", "\n"]).map(str.encode),
    st.sampled_from(["終", "🐨", "é"]).map(lambda char: char.encode()[:-1]),
    st.binary(max_size=2),
)


@given(
    st.lists(parts, max_size=12).map(b"".join),
    st.lists(st.sampled_from(STOPS), max_size=4),
    st.lists(st.integers(0, 10_000), max_size=12),
)
@example(b"aaab", ["aab"], [1, 2, 3])
@example("終終わり".encode(), ["終わり"], [4, 5])
def test_stops_split_over_any_tokens(data: bytes, stops: list[str], places: list[int]) -> None:
    kept, stopped = expected(data, stops)
    text, stream = run(cut(data, places), stops)
    assert (text, stream.stopped, stream.kept_bytes) == (kept.decode("utf-8", "replace"), stopped, len(kept))


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(["###"])
    assert stream.feed("é #".encode()) == "é "
    assert stream.feed(b"## more") == ""
    assert stream.stopped
    assert (stream.feed(b"later"), stream.finish(), stream.text, stream.kept_bytes) == ("", "", "é ", 3)


def test_a_stop_after_half_a_character_flushes_it() -> None:
    stream = TextStream(["END"])
    assert stream.feed("日".encode()[:2]) == ""
    assert stream.feed(b"END") == "\ufffd"
    assert stream.kept_bytes == 2


def test_the_stop_that_is_complete_first_counts_however_it_is_cut() -> None:
    for pieces in ([b"xabcd"], [b"xa", b"bc", b"d"], [bytes([byte]) for byte in b"xabcd"]):
        text, stream = run(pieces, ["abcd", "bc"])
        assert (text, stream.kept_bytes) == ("xa", 2)


def test_half_a_stop_is_released_at_the_end() -> None:
    stream = TextStream(["<|im_end|>", ""])
    assert stream.feed(b"hi <|im_e") == "hi "
    assert stream.finish() == "<|im_e"
    assert (stream.stopped, stream.text, stream.kept_bytes) == (False, "hi <|im_e", 9)


@pytest.mark.parametrize("stops", [[], ["\nHuman:", "</s>", "###"]])
def test_the_cost_of_a_token_is_flat(stops: list[str]) -> None:
    def cost_of(count: int, stream: TextStream) -> float:
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(count // 5):
                stream.feed(b" token")
            best = min(best, (time.perf_counter() - began) / (count // 5))
        return best

    stream = TextStream(stops)
    early = cost_of(500, stream)
    for _ in range(20_000):
        stream.feed(b" token")
    late = cost_of(500, stream)
    assert late < 3 * early + 2e-6
    assert early < 100e-6  # measured 1 to 3 microseconds; the room is for busy machines


def test_text_read_at_every_token_is_not_joined_anew_each_time() -> None:
    stream = TextStream()
    for _ in range(3500):
        stream.feed(b"word ")
        _ = stream.text
    assert stream.text == "word " * 3500
    assert stream.text is stream.text


SEQUENCES = [
    "\x1b[31m", "\x1b[0m", "\x1b[1;38;5;196m", "\x1b[38:2::255:0:0m", "\x1b[2J", "\x1b[H", "\x1b[10;20H", "\x1b[3A",
    "\x1b[K", "\x1b[?25l", "\x1b[?1049h", "\x1b[?2004h", "\x1b[6n", "\x1b[c", "\x1b[>c", "\x1b[!p", "\x1b[4 q",
    "\x1b[8;50;100t", "\x1b[20t", "\x1b[1$r", "\x1b[5i", "\x1b]0;title\x07", "\x1b]2;title\x1b\\", "\x1b]52;c;aGk=\x07",
    "\x1b]52;c;aGk=\x1b\\", "\x1b]8;;http://evil.example\x1b\\", "\x1b]8;id=1;http://evil.example\x07",
    "\x1b]4;1;rgb:ff/00/00\x07", "\x1b]10;?\x07", "\x1b]1337;File=inline=1:AAAA\x07", "\x1b]777;notify;a;b\x07",
    "\x1bPq#0;2;0;0;0~-\x1b\\", "\x1bP$qm\x1b\\", "\x1bP+q544e\x1b\\", "\x1bPtmux;\x1b\x1b]52;c;aGk=\x07\x1b\\",
    "\x1bXsos\x1b\\", "\x1b^pm\x1b\\", "\x1b_Ga=T;AAAA\x1b\\", "\x1b(0", "\x1b)B", "\x1b*A", "\x1b$(C", "\x1b%G",
    "\x1b#8", "\x1b F", "\x1bOP", "\x1bNx", "\x1bc", "\x1b7", "\x1b8", "\x1b=", "\x1b>", "\x1bM", "\x1bD", "\x1bE",
    "\x1bH", "\x1bZ", "\x1b\\", "\x1bn", "\x9b31m", "\x9b?1049h", "\x9d0;title\x9c", "\x9d52;c;aGk=\x07", "\x90q~\x9c",
    "\x98s\x9c", "\x9ep\x9c", "\x9fG\x9c", "\x8fP", "\x8ex", "\x1b]0;a\x18", "\x1b[31\x18", "\x1b[3\x1b[31m",
    "\x1b]0;a\x1b[31m", "\x1b[3\x071m", "\x1b\x1b[31m",
]  # fmt: skip
FORBIDDEN = [chr(code) for code in range(0xA0) if unicodedata.category(chr(code)) == "Cc" and chr(code) not in "\n\t"]


def clean(text: str) -> bool:
    return not any(char in text for char in FORBIDDEN)


def in_two(text: str, place: int) -> str:
    escapes = EscapeFilter()
    return escapes.feed(text[:place]) + escapes.feed(text[place:]) + escapes.finish()


@pytest.mark.parametrize("sequence", SEQUENCES, ids=ascii)
def test_a_sequence_vanishes_whole_wherever_it_is_split(sequence: str) -> None:
    text = f"before {sequence}日本 after\n"
    for place in range(len(text) + 1):
        assert in_two(text, place) == "before 日本 after\n"
    escapes = EscapeFilter()
    assert "".join(map(escapes.feed, text)) == "before 日本 after\n"


def test_enough_sequences_are_tried() -> None:
    assert len(set(SEQUENCES)) >= 40


@pytest.mark.parametrize("sequence", SEQUENCES, ids=ascii)
def test_a_sequence_cut_short_lets_nothing_through_and_costs_one_line_at_most(sequence: str) -> None:
    for length in range(1, len(sequence)):
        shown = plain(f"a{sequence[:length]}\nb\n")
        assert clean(shown)
        assert shown.startswith("a")
        assert shown.endswith("\nb\n")


@pytest.mark.parametrize("char", FORBIDDEN, ids=ascii)
def test_every_control_character_is_removed(char: str) -> None:
    assert clean(plain(f"a{char}b{char}"))
    assert plain(f"a{char}\nb") == "a\nb"


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*SEQUENCES, *FORBIDDEN, "\r\n", "\n", "\t", "\u202e", "\ud800"]), st.text(max_size=5)
        )
    ).map("".join),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_any_chunking_gives_the_same_clean_text(text: str, places: list[int]) -> None:
    escapes = EscapeFilter()
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    shown = "".join([escapes.feed(text[start:end]) for start, end in pairwise(edges)]) + escapes.finish()
    assert shown == plain(text)
    assert clean(shown)
    assert plain(shown) == shown
    assert shown.count("\n") == text.count("\n")
    shown.encode()  # can be written


def test_ordinary_text_is_left_alone() -> None:
    text = "tab\tnew\nline [31m 日本語 👩‍👩‍👧 naïve \u200f \u00a0 ] P \\ 50%"
    assert plain(text) == text


def test_a_character_set_ends_with_its_final_character() -> None:
    assert plain("\x1b([31m \x1b$(Ccharset") == "31m charset"


def test_line_ends() -> None:
    assert plain("a\r\nb\rc\n\r") == "a\nbc\n"
    assert in_two("a\r\nb", 2) == "a\nb"


def test_text_never_reads_otherwise_than_it_is() -> None:
    assert plain("if a\u202e\u2066 } \u2069 \u2066b") == "if a }  b"


@pytest.mark.parametrize("introducer", ["\x1b]", "\x1bP", "\x1b_", "\x9d", "\x1b["])
def test_an_unterminated_sequence_swallows_a_bounded_part_of_a_line(introducer: str) -> None:
    assert plain(f"a{introducer}2;2\nb") == "a\nb"
    filler = "0;" if "[" in introducer else " "
    rest = plain(introducer + filler * (2 * MAX_SEQUENCE) + "seen")
    assert rest.endswith("seen")
    assert len(rest) >= len(filler) * 2 * MAX_SEQUENCE - MAX_SEQUENCE


def test_the_filter_is_cheap_on_plain_text() -> None:
    escapes = EscapeFilter()
    began = time.perf_counter()
    for _ in range(1000):
        escapes.feed(" token")
    assert (time.perf_counter() - began) / 1000 < 100e-6


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" two  spaces.gguf\n", "two  spaces.gguf"),
        ("a\n \t b\r\n\u2028c", "a b c"),
        ("\x1b[31mred\x1b[0m \x07bell", "red bell"),
        ("word " * 9, "word word word word…"),
        ("", ""),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text, 20) == line
