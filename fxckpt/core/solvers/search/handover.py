"""When gradients that are already allocated leave, kept up to date while their ops move.

`schedule.deliveries` walks the whole schedule. A search that moves one op at a time needs only the stages around it:
what is handed over before the first slot that changed stays, and so does all behind the first stage that ends where one
ended before.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from fxckpt.core.solvers.search.wiring import Wiring


class Handover:
    """Stages of backward on a tape, by the slots in which they end.

    Args:
        wiring: of the graph.
        split: the slot in which backward starts, where gradients that are passed through wait.
        end: the slot behind the last; what is left then leaves there.
    """

    def __init__(self, wiring: Wiring, split: int, end: int) -> None:
        self.wiring = wiring
        self.split = split
        self.end = end
        self._slots: list[int] = []  # where gradients are finished
        self._ends: list[int] = []  # where stages end
        self._changed = {(split, -1), (end, -1)}  # (slot, op) that have come or gone

    def move(self, op: int, old: int | None, new: int | None) -> None:
        """An op that finishes gradients runs first in slot `new` instead of `old`; None: not at all."""
        if old is not None:
            del self._slots[bisect_left(self._slots, old)]
            self._changed ^= {(old, op)}
        if new is not None:
            insort(self._slots, new)
            self._changed ^= {(new, op)}

    def moved(self, ops: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Pairs (gradient, slot after which it is handed over), of all that may have changed since the last call.

        Args:
            ops: the op in each slot.
        """
        if not self._changed:
            return
        low, high = min(self._changed)[0], max(self._changed)[0]
        self._changed.clear()
        first = bisect_left(self._ends, low)
        start = self._ends[first - 1] + 1 if first else self.split
        before, ends = self._ends[first:], list[int]()
        waiting: list[int] = []
        for slot in self._finishing(start):
            waiting += self._finished(ops, slot)
            if sum(self.wiring.sizes[s] for s in waiting) < self.wiring.graph.stage_bytes:
                continue
            yield from ((storage, slot) for storage in waiting)
            waiting = []
            ends.append(slot)
            known = bisect_left(before, slot)
            if slot >= high and known < len(before) and before[known] == slot:
                self._ends[first:] = ends + before[known + 1 :]
                return
        yield from ((storage, self.end) for storage in waiting)
        self._ends[first:] = ends

    def _finishing(self, start: int) -> Iterator[int]:
        if start <= self.split and (not self._slots or self._slots[0] > self.split):
            yield self.split
        yield from self._slots[bisect_left(self._slots, start) :]

    def _finished(self, ops: Sequence[int], slot: int) -> tuple[int, ...]:
        own = self.wiring.gradients_of[ops[slot]] if ops[slot] >= 0 else ()
        return (*self.wiring.passed_through, *own) if slot == self.split else own
