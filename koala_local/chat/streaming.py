"""A reply written in a second thread, so that Ctrl-C is heard at once and drawing costs no decoding time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from koala_local.chat.ledger import Answer
from koala_local.engine.base import Engine

Act = Callable[[Callable[[str], None], Callable[[int, int], None]], Answer]
"""Something that writes a reply: it is given `on_text` and `on_prefill`."""


class ReplyStream:
    """Iterate to get the reply's text as it is written; then `answer()`.

    An exception in the iterating thread, such as SystemExit from a signal, interrupts the engine, and goes on when the
    reply has ended. For Ctrl-C let `terminal.on_ctrl_c` call the engine's `interrupt`.
    """

    def __init__(self, engine: Engine, act: Act, on_prefill: Callable[[int, int], None]) -> None:
        self._engine, self._act, self._on_prefill = engine, act, on_prefill
        self._chunks: SimpleQueue[str | None] = SimpleQueue()
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    def _work(self) -> None:
        try:
            self._answer = self._act(self._chunks.put, self._on_prefill)
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        finally:
            self._chunks.put(None)

    def __iter__(self) -> Iterator[str]:
        self._engine.resume()
        thread = threading.Thread(target=self._work, name="reply")
        thread.start()
        try:
            while (chunk := self._chunks.get()) is not None:
                yield chunk
        finally:
            if thread.is_alive() and self._answer is None and self._error is None:
                self._engine.interrupt()
            thread.join()

    def answer(self) -> Answer:
        """The finished reply. Raises what the writing raised, Interrupted among it."""
        if self._error is not None:
            raise self._error
        assert self._answer is not None, "iterate first"
        return self._answer
