"""A schedule laid out on a tape of slots, with its live bytes kept exact while it is edited.

`simulate` walks the whole schedule; a search that tries a hundred thousand edits can't. A tape keeps the runs of each
op and the readers of each storage as sorted slots, so putting in or taking out one run touches only the copies that it
writes and reads: a few range additions to one array. An empty slot never holds more than its neighbours, so gaps for
later edits cost nothing.

Two facts make edits simple. Whether a read is satisfied depends only on the *first* run of its producer, so a repeat
may stand anywhere after that. And an edit is undone by the opposite edit, so a rejected move is played backwards.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.search.handover import Handover
from fxckpt.core.solvers.search.wiring import Wiring

EMPTY = -1


class Tape:
    """A valid schedule under edit.

    Slots below `split` are forward. Tangents appear in slot `split`; it stays empty, or if the wiring is `anchored`
    it holds the first backward step, which then has to stay the first. Slots above are backward.

    Attributes:
        slots: the op in each slot, or EMPTY.
        runs: for each op the slots in which it runs, ascending.
        readers: for each storage the slots that read it, ascending.
        births: for each storage the slots in which a copy is born, ascending; none for what only a repeat reads.
        first_birth, last_read: for each storage the first of its births and the last of its readers; behind the end and
            -1 if there are none.
        hold: for each storage the slot up to which something other than an op keeps its first copy, or -1.
        live: bytes in use in each slot [B].
        area: the sum of `live` [B].
        step_us: time of the schedule [µs].
        edits: how many runs were put in or taken out so far, to bound a search.
    """

    def __init__(self, wiring: Wiring, schedule: Schedule, *, gap: int = 0) -> None:
        """Lay out a schedule with `gap` empty slots before each backward step and at the end."""
        self.wiring = wiring
        self.split = schedule.forward_steps
        self.slots = list(schedule.order[: self.split])
        if not wiring.anchored:
            self.slots += [EMPTY] * (gap + 1)
        for op in schedule.order[self.split :]:
            self.slots += [op] + [EMPTY] * gap
        self.end = len(self.slots)
        self.slots.append(EMPTY)
        graph = wiring.graph
        self.runs: list[list[int]] = [[] for _ in graph.ops]
        self.readers: list[list[int]] = [[] for _ in graph.storages]
        for slot, op in enumerate(self.slots):
            if op != EMPTY:
                self.runs[op].append(slot)
                for storage in wiring.reads[op]:
                    self.readers[storage].append(slot)
        given, never = [self.split] if self.split < len(schedule) else [], list[int]()
        tangents = frozenset(wiring.tangents)
        self.births = [
            self.runs[op] if op >= 0 else given if storage in tangents else never
            for storage, op in enumerate(wiring.producer)
        ]
        self.first_birth = np.array([births[0] if births else self.end + 1 for births in self.births])
        self.last_read = np.array([readers[-1] if readers else -1 for readers in self.readers])
        self.hold = [-1] * len(graph.storages)
        self._handover = Handover(wiring, self.split, self.end) if graph.gradients_allocated else None
        self._hold_outputs()
        self.live = self._live_bytes()
        self.area = int(self.live.sum())
        self.step_us = sum(wiring.times_us[op] for op in schedule.order)
        self.edits = 0
        self._journal: list[tuple[int, int]] = []  # (op, slot) put in, (~op, slot) taken out
        self._risen = self._nowhere = (self.end + 1, 0)

    def _hold_outputs(self) -> None:
        """Outputs stay to the end, updates to the end of forward, gradients until they are handed over."""
        graph = self.wiring.graph
        for storage in graph.updates:
            self.hold[storage] = self.split - 1
        for storage in graph.outputs:
            self.hold[storage] = self.end
        self._least_hold = list(self.hold)
        if self._handover is None:
            for storage in graph.gradients:
                self.hold[storage] = self.end
            return
        for op in self.wiring.gradient_ops:
            self._handover.move(op, None, self.runs[op][0])
        for storage, slot in self._handover.moved(self.slots):
            self.hold[storage] = max(self.hold[storage], slot)

    def _live_bytes(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        wiring = self.wiring
        change = np.zeros(self.end + 2, dtype=np.int64)
        for storage, size in enumerate(wiring.sizes):
            for born, dies in self.copies(storage) if size else ():
                change[born] += size
                change[dies + 1] -= size
        for op, runs in enumerate(self.runs):
            if len(runs) > 1:
                change[runs[0]] += wiring.replay_bytes[op]
                change[runs[-1] + 1] -= wiring.replay_bytes[op]
        live = np.cumsum(change[:-1]) + wiring.graph.static_bytes
        for slot, op in enumerate(self.slots):
            if op != EMPTY:
                live[slot] += wiring.workspace_bytes[op]
        return live

    # --- reading -----------------------------------------------------------------------------------------------

    def copies(self, storage: int) -> list[tuple[int, int]]:
        """Lifetimes (born, dies) of the copies of a storage, in order."""
        return [self._copy(storage, number) for number in range(len(self.births[storage]))]

    def _copy(self, storage: int, number: int) -> tuple[int, int]:
        born, last = self.births[storage][number], self.last_use(storage, number)
        return born, last if last > born else born

    def last_use(self, storage: int, number: int, *, without: int = -1) -> int:
        """The last slot in which a copy is read or held, all slots but `without` counted; one before its birth if it
        is not."""
        births, readers = self.births[storage], self.readers[storage]
        i = bisect_left(readers, births[number + 1]) if number + 1 < len(births) else len(readers)
        if i and readers[i - 1] == without:
            i -= 1
        last = readers[i - 1] if i else -1
        if number == 0 and self.hold[storage] > last:
            return self.hold[storage]
        return last

    def copy_at(self, storage: int, slot: int) -> tuple[int, int]:
        """Lifetime of the copy that a reader in `slot` would read."""
        return self._copy(storage, bisect_left(self.births[storage], slot) - 1)

    def first_reader(self, op: int, slot: int) -> int:
        """The first slot that reads what the run in `slot` writes, or -1 if nothing does."""
        runs, found = self.runs[op], -1
        i = bisect_left(runs, slot) + 1
        until = runs[i] if i < len(runs) else self.end + 1
        for storage in self.wiring.writes[op]:
            readers = self.readers[storage]
            j = bisect_left(readers, slot)
            if j < len(readers) and readers[j] < until and (found < 0 or readers[j] < found):
                found = readers[j]
        return found

    def peak_bytes(self) -> int:
        """The most bytes in use in any slot [B]."""
        self._settle()
        return int(self.live.max())

    def risen_bytes(self, *, exact: bool = True) -> int:
        """The most bytes in use [B] in the slots where edits since the last mark may have added some; else 0.

        If not `exact`, as if gradients were still handed over where they were, which is quicker.
        """
        if exact:
            self._settle()
        return int(self.live[slice(*self._risen)].max(initial=0))

    def repeated(self) -> list[tuple[int, int]]:
        """All repeats as pairs (op, slot)."""
        return [(op, slot) for op, runs in enumerate(self.runs) for slot in runs[1:]]

    def schedule(self) -> Schedule:
        """The schedule as it stands."""
        return Schedule(
            tuple(op for op in self.slots if op != EMPTY), sum(op != EMPTY for op in self.slots[: self.split])
        )

    # --- editing -----------------------------------------------------------------------------------------------

    def put(self, op: int, slot: int) -> None:
        """Run `op` in an empty slot."""
        self._journal.append((op, slot))
        self._put(op, slot)

    def take(self, slot: int) -> None:
        """Empty a slot. The readers of what it wrote go over to the copy before; an only run must be put back."""
        op = self.slots[slot]
        self._journal.append((~op, slot))
        self._take(op, slot)

    def mark(self) -> int:
        """A point to which `undo` can return, and from which on `risen_bytes` looks."""
        self._risen = self._nowhere
        return len(self._journal)

    def undo(self, mark: int) -> None:
        """Take back all edits since `mark`."""
        while len(self._journal) > mark:
            op, slot = self._journal.pop()
            if op >= 0:
                self._take(op, slot)
            else:
                self._put(~op, slot)
        self._settle()

    def commit(self) -> None:
        """Forget how to undo."""
        self._journal.clear()

    def _add(self, low: int, high: int, size_bytes: int) -> None:
        """So many bytes more, or fewer, in slots low..high-1."""
        if low < high:
            self.live[low:high] += size_bytes
            self.area += size_bytes * (high - low)
            if size_bytes > 0:
                first, last = self._risen
                if low < first or high > last:
                    self._risen = min(first, low), max(last, high)

    def _put(self, op: int, slot: int) -> None:
        wiring = self.wiring
        self.edits += 1
        self.slots[slot] = op
        self.step_us += wiring.times_us[op]
        if wiring.workspace_bytes[op]:
            self._add(slot, slot + 1, wiring.workspace_bytes[op])
        for storage in wiring.reads[op]:
            if size := wiring.sizes[storage]:
                self._add(self._last_use(storage, slot) + 1, slot + 1, size)
            insort(self.readers[storage], slot)
            self.last_read[storage] = self.readers[storage][-1]
        self._rewrite(op, slot, add=True)

    def _take(self, op: int, slot: int) -> None:
        wiring = self.wiring
        self.edits += 1
        self.slots[slot] = EMPTY
        self.step_us -= wiring.times_us[op]
        if wiring.workspace_bytes[op]:
            self._add(slot, slot + 1, -wiring.workspace_bytes[op])
        for storage in wiring.reads[op]:
            readers = self.readers[storage]
            del readers[bisect_left(readers, slot)]
            self.last_read[storage] = readers[-1] if readers else -1
            if size := wiring.sizes[storage]:
                self._add(self._last_use(storage, slot) + 1, slot + 1, -size)
        self._rewrite(op, slot, add=False)

    def _last_use(self, storage: int, slot: int) -> int:
        """Where the copy that a reader in `slot` reads would die without that reader; `slot` if there is none."""
        births = self.births[storage]
        number = bisect_left(births, slot) - 1
        return self._copy(storage, number)[1] if number >= 0 else slot

    def _rewrite(self, op: int, slot: int, *, add: bool) -> None:
        """Add or remove a run and give the copies around it their new lifetimes."""
        wiring, runs = self.wiring, self.runs[op]
        number = bisect_left(runs, slot)
        if number:
            self._rewrite_repeat(op, slot, number, sign=1 if add else -1)
        else:
            old, new = (0,) if add else (0, 1), (0, 1) if add else (0,)
            self._cover(op, old, sign=-1)
        before = (runs[0], runs[-1]) if len(runs) > 1 else None
        first = runs[0] if runs else None
        if add:
            runs.insert(number, slot)
        else:
            del runs[number]
        if wiring.replay_bytes[op]:
            self._replay(op, before, (runs[0], runs[-1]) if len(runs) > 1 else None)
        if not number:
            self.first_birth[list(wiring.writes[op])] = runs[0] if runs else self.end + 1
            self._cover(op, new, sign=1)
            if self._handover is not None and wiring.gradients_of[op]:
                self._handover.move(op, first, runs[0] if runs else None)

    def _cover(self, op: int, numbers: tuple[int, ...], *, sign: int) -> None:
        """Add or subtract what copies of all that an op writes take."""
        for storage in self.wiring.writes[op]:
            size = sign * self.wiring.sizes[storage]
            for number in numbers if size else ():
                if number < len(self.runs[op]):
                    born, dies = self._copy(storage, number)
                    self._add(born, dies + 1, size)

    def _rewrite_repeat(self, op: int, slot: int, number: int, *, sign: int) -> None:
        """What a repeat changes: the copy before dies at its last reader, and a new one is there up to the next run."""
        runs = self.runs[op]
        rest = number if number < len(runs) and runs[number] != slot else number + 1
        born, until = runs[number - 1], runs[rest] if rest < len(runs) else self.end + 1
        for storage in self.wiring.writes[op]:
            size = sign * self.wiring.sizes[storage]
            if not size:
                continue
            readers = self.readers[storage]
            i = bisect_left(readers, slot)
            dies = max(born, readers[i - 1]) if i else born
            if number == 1:
                dies = max(dies, self.hold[storage])
            j = bisect_left(readers, until)
            last = readers[j - 1] if j > i else slot
            if dies >= slot:  # something holds the copy before: there are two of them
                self._add(slot, min(dies, last) + 1, size)
            elif j > i:
                self._add(dies + 1, slot, -size)
            else:
                self._add(slot, slot + 1, size)

    def _replay(self, op: int, before: tuple[int, int] | None, after: tuple[int, int] | None) -> None:
        """State that repeats of an op read is there from its first run to its last, if there are two."""
        size = self.wiring.replay_bytes[op]
        if before != after:
            if before:
                self._add(before[0], before[1] + 1, -size)
            if after:
                self._add(after[0], after[1] + 1, size)

    def _settle(self) -> None:
        """Where gradients are handed over may have changed: give the first copies their new ends."""
        if self._handover is None:
            return
        for storage, delivered in self._handover.moved(self.slots):
            until = max(delivered, self._least_hold[storage])
            if until != self.hold[storage] and self.births[storage]:
                _, old = self._copy(storage, 0)
                self.hold[storage] = until
                _, new = self._copy(storage, 0)
                self._add(old + 1, new + 1, self.wiring.sizes[storage])
                self._add(new + 1, old + 1, -self.wiring.sizes[storage])
