"""From the bytes of tokens to text that is safe to show.

`TextStream` joins tokens into whole characters and ends at a stop string; `EscapeFilter`, `plain` and `one_line` keep
terminal escapes out of whatever text a model, a model file or a path brings along.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from enum import Enum, auto


class TextStream:
    """Bytes of tokens in, certain text out: never half a character, never a part of a stop string.

    Stop strings are looked for in the bytes: UTF-8 is self-synchronizing, so the same places match as in the text, and
    the place of a match is at hand as a number of bytes. Of several the one that is complete first counts (the longest
    of those that end there), so the outcome does not hang on how the bytes were cut into tokens.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        # A lone surrogate cannot be decoded from any input, but must not fail here either.
        self._stops = tuple(stop.encode("utf-8", "surrogatepass") for stop in stops if stop)
        self._held = b""  # the tail that may be the beginning of a stop string
        self._half = b""  # what is released of a character that is not whole
        self._released = 0  # bytes
        self._chunks: list[str] = []
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """The text that became certain with `piece`; "" once stopped."""
        if not self._stops:
            return self._release(piece)
        if self.stopped:
            return ""
        data = self._held + piece
        end = self._stop_start(data)
        if end is not None:
            self.stopped, self._held = True, b""
            return self._release(data[:end], final=True)
        cut = min((_partial_start(data, stop) for stop in self._stops), default=len(data))
        self._held = data[cut:]
        return self._release(data[:cut])

    def finish(self) -> str:
        """What was held back: half a stop string as it is, half a character as U+FFFD."""
        held, self._held = self._held, b""
        return self._release(held, final=True)

    @property
    def text(self) -> str:
        """All text released so far. Joined only when asked for."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0] if self._chunks else ""

    @property
    def kept_bytes(self) -> int:
        """Bytes fed, or when stopped the bytes before the stop string."""
        return self._released + len(self._held)

    def _release(self, data: bytes, *, final: bool = False) -> str:
        self._released += len(data)
        text, used = codecs.utf_8_decode(self._half + data, "replace", final)
        self._half = (self._half + data)[used:]
        if text:
            self._chunks.append(text)
        return text

    def _stop_start(self, data: bytes) -> int | None:
        """Where the stop string that is complete first begins."""
        found = [(start + len(stop), start) for stop in self._stops if (start := data.find(stop)) >= 0]
        return min(found)[1] if found else None


def _partial_start(data: bytes, stop: bytes) -> int:
    """Where the longest tail of `data` that begins `stop` starts, or its length."""
    start = data.find(stop[:1], max(0, len(data) - len(stop) + 1))
    while start >= 0 and not stop.startswith(data[start:]):
        start = data.find(stop[:1], start + 1)
    return start if start >= 0 else len(data)


class _State(Enum):
    TEXT = auto()
    ESCAPE = auto()  # after ESC, and its intermediate characters
    SHIFT = auto()  # one character of another character set follows
    CSI = auto()
    STRING = auto()  # the payload of OSC, DCS, SOS, PM or APC


_INTRODUCERS = {
    "\x1b": _State.ESCAPE,
    "\x8e": _State.SHIFT,
    "\x8f": _State.SHIFT,
    "\x90": _State.STRING,
    "\x98": _State.STRING,
    "\x9b": _State.CSI,
    "\x9d": _State.STRING,
    "\x9e": _State.STRING,
    "\x9f": _State.STRING,
}
_ENDS_STRING = "\x07\x18\x1a\x9c"  # BEL, CAN, SUB, ST
_CANCELS = "\x18\x1a"
# An unterminated sequence ends at the next newline, or after this many characters where none comes: a terminal would
# wait for ever, but here a stray introducer may cost part of a line, never the rest of the reply. Real titles, links
# and colour queries are shorter; what is left of a longer payload is shown as the harmless text it then is.
MAX_SEQUENCE = 1000
# C0 but newline and tab, DEL, C1, bidirectional overrides and isolates, lone surrogates (they cannot be written).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_LINE_BREAK = re.compile(r"\s*[^\S ]\s*")  # and tabs


class EscapeFilter:
    """Lets no terminal escape sequence through, however the text is cut into chunks.

    Whole sequences are removed (ECMA-48: CSI, OSC, DCS, SOS, PM, APC, SS2, SS3, character sets; with ESC and as single
    C1 characters), so are all other control characters but newline and tab, and the bidirectional overrides and
    isolates that make text read otherwise than it is. A lone surrogate becomes U+FFFD. Nothing is ever held back.
    """

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._length = 0  # of the sequence so far

    def feed(self, text: str) -> str:
        """The part of `text` that may be shown."""
        kept: list[str] = []
        position = 0
        while position < len(text):
            if self._state is _State.TEXT:
                unsafe = _UNSAFE.search(text, position)
                kept.append(text[position : unsafe.start() if unsafe else len(text)])
                if unsafe is None:
                    break
                position = unsafe.start()
            kept.append(self._step(text[position]))
            position += 1
        return "".join(kept)

    def finish(self) -> str:
        """Forget an unterminated sequence. Always "": nothing is held back."""
        self._state = _State.TEXT
        return ""

    def _step(self, char: str) -> str:
        """Take one character, return what of it is shown."""
        if char in _INTRODUCERS:
            self._state, self._length = _INTRODUCERS[char], 0
            return ""
        self._length += 1
        if self._state is _State.TEXT:
            return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= char <= "\udfff" else ""
        if char == "\n" or self._length > MAX_SEQUENCE:
            self._state = _State.TEXT
        elif self._state is _State.STRING:
            if char in _ENDS_STRING:
                self._state = _State.TEXT
            return ""
        elif char < " " or "\x7f" <= char <= "\x9f":
            if char in _CANCELS:
                self._state = _State.TEXT
            return ""  # a terminal obeys these without leaving the sequence
        elif char <= "~":
            self._state = self._after(char)
            return ""
        else:
            self._state = _State.TEXT  # no sequence has characters beyond ASCII: this is text again
        return _UNSAFE.sub("", char)

    def _after(self, char: str) -> _State:
        """The state after a printable ASCII character within ESC, CSI or a single shift."""
        if self._state is _State.CSI:
            return _State.CSI if char < "@" else _State.TEXT
        if self._state is _State.SHIFT:
            return _State.TEXT
        if char < "0":  # ESC takes any number of intermediate characters ("ESC ( B"), then a final one
            return _State.ESCAPE
        if self._length > 1:
            return _State.TEXT
        return _INTRODUCERS.get(chr(ord(char) + 0x40), _State.TEXT)  # "ESC [" and its like stand for one C1 character


def plain(text: str) -> str:
    """`text` without terminal escapes: for names, paths and error messages that came from outside."""
    return EscapeFilter().feed(text)


def one_line(text: str, length: int = 200) -> str:
    """The beginning of `text` on one line, without terminal escapes. Spaces between words stay as they are: a file's
    name may have two of them."""
    line = _LINE_BREAK.sub(" ", plain(text[: 4 * length])).strip()
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"
