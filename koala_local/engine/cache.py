"""What the KV cache holds, token by token: which prefix can be kept, what must make way.

Every evaluated token takes one cell. Slots that were copied share the cells of their common part, so cells are counted,
not tokens: the engine is never asked for a cell it does not have. Cells get names when they are first shared; until
then they are their slot's own, and it is enough to know how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from koala_local.engine.base import Engine
from koala_local.errors import ContextError


@dataclass(slots=True)
class _Slot:
    """The tokens of one sequence, the names of the cells that hold the first of them, and when it was last active."""

    ids: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)  # no longer than `ids`: the cells of the rest are its own
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
        self._free = engine.context_size  # cells
        self._new_cell = count()
        self._references: Counter[int] = Counter()  # of named cells
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
        return self.engine.context_size - self._free

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
            self._append(slot, ids[: self.engine.evaluated_tokens - before])

    def generate(self, sample: Callable[[], int], most: int) -> Iterator[int]:
        """Draw a token, yield it and, once another is wanted, evaluate it: up to `most` times. Raises as `extend` does.
        Every token of a reply finds the processor's caches cold: each line here costs speed."""
        ids, evaluate = self.ids, self.engine.stepper(self._active)
        for _ in range(most):
            token = sample()
            yield token
            if not self._free:
                self._make_way(1)
            evaluate(token, len(ids))
            ids.append(token)
            self._free -= 1

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of the active slot."""
        slot = self._slots[self._active]
        if length < len(slot.ids):
            self._forget(slot, self.engine.crop(self._active, length), len(slot.ids))

    def shift(self, start: int, end: int) -> None:
        """Forget positions [start, end) of the active slot and move the rest down. Held branches share the moved cells
        and leave."""
        for number in range(len(self._slots)):
            if number != self._active:
                self._release(number)
        try:
            self.engine.shift(self._active, start, end, self.ids[-1])
        except BaseException:
            self._release(self._active)  # nobody knows what it holds
            raise
        self._forget(self._slots[self._active], start, end)

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
        while needed > self._free:
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
        if not self.engine.shares_cells and len(original.ids) > self._free:
            return  # a whole second copy has no place
        self.engine.copy(source, target)
        copied.last_used = next(self._clock)
        if not self.engine.shares_cells:
            self._append(copied, original.ids)
            return
        own = [next(self._new_cell) for _ in range(len(original.ids) - len(original.cells))]
        original.cells += own
        self._references.update(own)
        copied.ids, copied.cells = list(original.ids), list(original.cells)
        self._references.update(copied.cells)

    def _release(self, number: int) -> None:
        if self._slots[number].ids:
            self.engine.crop(number, 0)
            self._forget(self._slots[number], 0, len(self._slots[number].ids))

    def _append(self, slot: _Slot, ids: Sequence[int]) -> None:
        slot.ids += ids
        self._free -= len(ids)

    def _forget(self, slot: _Slot, start: int, end: int) -> None:
        """Take the tokens from `start` to `end` out of a slot; cells that no slot holds any more are free."""
        named = slot.cells[start:end]
        self._free += end - start - len(named)
        for cell in named:
            self._references[cell] -= 1
            if not self._references[cell]:
                del self._references[cell]
                self._free += 1
        del slot.ids[start:end], slot.cells[start:end]
