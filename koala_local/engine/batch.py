"""Tokens on their way into llama.cpp, and how many of them it should get at once.

On a CPU, llama.cpp's flash attention goes through the history query by query, but from 64 queries on in tiles, as a
product of matrices: a sixth of the time per query where this was measured (benchmarks/attention.py). Most messages are
shorter. Behind a long history they are therefore filled up to one tile with tokens that nobody sees: these stand in a
sequence of their own, want no logits, and are forgotten at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from koala_local.engine.bindings import ll

TILE = 64
_FASTER = 6  # how many times less a query takes in a tile
_WEIGHTS = 4  # a token's weights take as long as this many times the model's width of history in a tile; 3 was measured


def tiled(count: int, history: int, width: int) -> int:
    """How many tokens `count` ones behind `history` others are best evaluated as, in a model of this width."""
    gain, cost = history * (_FASTER * count - TILE), _WEIGHTS * width * (TILE - count)
    return TILE if 1 < count < TILE and gain > cost else count


class Batch:
    """A llama_batch over arrays that are filled in place: a decode step allocates nothing. It begins as one token whose
    logits are wanted."""

    def __init__(self, room: int, filler_slot: int) -> None:
        self.room, self.slot, self._filler_slot = room, ll.llama_seq_id(), ll.llama_seq_id(filler_slot)
        self.tokens, self.positions = (ll.llama_token * room)(), (ll.llama_pos * room)()
        self._counts = (ctypes.c_int32 * room)(*[1] * room)
        self._slots = (ctypes.POINTER(ll.llama_seq_id) * room)(*[ctypes.pointer(self.slot)] * room)
        self._wanted = (ctypes.c_int8 * room)(1)
        self.batch = ll.llama_batch(1, self.tokens, None, self.positions, self._counts, self._slots, self._wanted)

    def fill(self, ids: Sequence[int], slot: int, position: int, *, size: int = 0, every: bool = False) -> Any:
        """All of `ids` in one slot, with filler up to `size`; logits for the last of `ids`, or for `every` one."""
        count = len(ids)
        filler = max(0, size - count)
        total = count + filler
        self.slot.value = slot
        self.tokens[:total] = [*ids, *[ids[0]] * filler]
        self.positions[:total] = [*range(position, position + count), *range(filler)]
        self._slots[:total] = [ctypes.pointer(self.slot)] * count + [ctypes.pointer(self._filler_slot)] * filler
        ctypes.memset(self._wanted, int(every), total)
        self._wanted[count - 1] = 1
        self.batch.n_tokens = total
        return self.batch
