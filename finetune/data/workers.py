"""Work spread over processes, with results in the order of the work and little of it in memory at a time."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """`count` processes; with one, everything happens in this one."""

    def __init__(self, pool: ProcessPoolExecutor | None, count: int) -> None:
        self._pool, self._ahead = pool, 2 * count + 1

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with what the function makes of it, in order. `items` are taken only a few ahead."""
        if self._pool is None:
            yield from ((item, function(item)) for item in items)
            return
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            with _ctrl_c_waits():  # here processes are started
                future = self._pool.submit(function, item)
            waiting.append((item, future))
            if len(waiting) > self._ahead:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """The processes; they end with the block, and with this process, however it ends."""
    if count == 1:
        yield Workers(None, 1)
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_parent)
    try:
        yield Workers(pool, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Until the block ends; and a process that is started in it never gets one. The terminal sends it to all, and one
    that it ends in the midst of its work can leave the others waiting for ever: the first process alone acts on it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A pool's process whose parent was killed would wait for work for ever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
