"""What the KV cache holds, token by token: which prefix can be kept, what must make way.

Every evaluated token takes one cell. Slots that were copied share the cells of their common part, so cells are counted,
not tokens: the engine is never asked for a cell it does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from koala_local.engine.base import Engine
from koala_local.errors import ContextError


@dataclass(slots=True)
class _Slot:
    """The tokens of one sequence, with the cell that holds each, and when it was last the active one."""

    ids: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    last_used: int = 0


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start. Compared by halves, at C speed."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixCache:
    """The active branch in one slot of an engine, other branches held in the rest until their cells are needed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._slots = [_Slot() for _ in range(engine.slots)]
        self._active = 0
        self._clock = count(1)
        self._new_cell = count()
        self._references: Counter[int] = Counter()
        for number in range(engine.slots):
            engine.crop(number, 0)  # whatever an earlier user of this engine left

    @property
    def ids(self) -> list[int]:
        """The tokens of the active slot, all evaluated. Not to be changed."""
        return self._slots[self._active].ids

    @property
    def active(self) -> int:
        """The number of the active slot."""
        return self._active

    @property
    def used_cells(self) -> int:
        return len(self._references)

    @property
    def held(self) -> int:
        """How many branches are held besides the active one."""
        return sum(bool(slot.ids) for slot in self._slots) - bool(self.ids)

    def adopt(self, ids: Sequence[int], *, hold: bool = True) -> int:
        """Make the active slot the longest held prefix of `ids`, and return its length. With `hold`, a branch that this
        would cut stays held in another slot."""
        ids = list(ids)
        shared = [common_prefix(slot.ids, ids) for slot in self._slots]
        best = max(range(len(shared)), key=lambda number: (shared[number], number == self._active))
        if hold and shared[best] < len(self._slots[best].ids) and shared[best] > 0:
            self._copy(best, self._spare_slot(keep=best))
        elif hold and shared[best] == 0 and self._slots[best].ids:
            best = self._spare_slot(keep=best)
        self._active = best
        self._slots[best].last_used = next(self._clock)
        self.crop(shared[best])
        return len(self.ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Evaluate `ids` behind the active slot's tokens; held branches make way, least recently used first.
        Raises ContextError when even the active one alone does not fit, Interrupted with what was done kept."""
        self._make_way(len(ids))
        slot, before = self._slots[self._active], self.engine.evaluated_tokens
        try:
            self.engine.evaluate(ids, slot=self._active, position=len(slot.ids))
        finally:
            done = self.engine.evaluated_tokens - before
            self._append(slot, ids[:done])

    def push(self, token: int) -> None:
        """`extend` by one token, as decoding does thousands of times: every line here costs decoding speed."""
        engine, slot = self.engine, self._slots[self._active]
        if len(self._references) >= engine.context_size:
            self._make_way(1)
        engine.evaluate((token,), slot=self._active, position=len(slot.ids))
        cell = next(self._new_cell)
        slot.ids.append(token)
        slot.cells.append(cell)
        self._references[cell] = 1

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of the active slot."""
        slot = self._slots[self._active]
        if length < len(slot.ids):
            self._cut(slot, self.engine.crop(self._active, length))

    def shift(self, start: int, end: int) -> None:
        """Forget positions [start, end) of the active slot and move the rest down. Held branches share the moved cells
        and leave."""
        for number in range(len(self._slots)):
            if number != self._active:
                self._release(number)
        self.engine.shift(self._active, start, end)
        slot = self._slots[self._active]
        self._forget(slot.cells[start:end])
        del slot.ids[start:end], slot.cells[start:end]

    def clear(self) -> None:
        """Forget everything."""
        for number in range(len(self._slots)):
            self._release(number)

    def restore(self, load: Callable[[int], Sequence[int]]) -> None:
        """Fill the active slot through `load`, which gets its number and returns the tokens it holds then.
        Everything held leaves first."""
        self.clear()
        self._append(self._slots[self._active], load(self._active))

    def _make_way(self, needed: int) -> None:
        while self.used_cells + needed > self.engine.context_size:
            others = [n for n, slot in enumerate(self._slots) if slot.ids and n != self._active]
            if not others:
                raise ContextError("the context is full", "start again with a larger --context")
            self._release(min(others, key=lambda number: self._slots[number].last_used))

    def _spare_slot(self, keep: int) -> int:
        """An empty slot, made by releasing the least recently used one but `keep` if need be."""
        others = [number for number in range(len(self._slots)) if number != keep]
        spare = min(others, key=lambda number: (bool(self._slots[number].ids), self._slots[number].last_used))
        self._release(spare)
        return spare

    def _copy(self, source: int, target: int) -> None:
        original, copied = self._slots[source], self._slots[target]
        if not self.engine.shares_cells and self.used_cells + len(original.ids) > self.engine.context_size:
            return  # a whole second copy has no place
        self.engine.copy(source, target)
        copied.ids, copied.last_used = list(original.ids), next(self._clock)
        shares = self.engine.shares_cells
        copied.cells = list(original.cells) if shares else [next(self._new_cell) for _ in original.cells]
        self._references.update(copied.cells)

    def _release(self, number: int) -> None:
        if self._slots[number].ids:
            self.engine.crop(number, 0)
            self._cut(self._slots[number], 0)

    def _append(self, slot: _Slot, ids: Sequence[int]) -> None:
        for token in ids:
            cell = next(self._new_cell)
            slot.ids.append(token)
            slot.cells.append(cell)
            self._references[cell] = 1

    def _cut(self, slot: _Slot, length: int) -> None:
        self._forget(slot.cells[length:])
        del slot.ids[length:], slot.cells[length:]

    def _forget(self, cells: Sequence[int]) -> None:
        for cell in cells:
            self._references[cell] -= 1
            if not self._references[cell]:
                del self._references[cell]
