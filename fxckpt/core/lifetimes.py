"""From when to when each copy of a storage is in memory: a matter of the order alone, whatever takes how long.

An op that another engine than compute carries out is only started where it stands. What it reads and writes is in use
until compute waits for it: at the first compute op that reads what it wrote, or what was made from that on other
engines, where it leaves the step, or else at the step's end. So an op that takes no time and reads the copy on the host
is the place where the original is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxckpt.core.arrays import Integers
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, deliveries, departures, first_runs, is_asynchronous

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """One copy of a storage: live from step `born` to step `dies`, both included.

    `born` is -1 for nothing here: what is there before the step is not a lifetime (see `Graph.static_bytes`).
    `recomputed` are copies that a repeat of a plain op writes.
    """

    storage: int
    born: int
    dies: int
    recomputed: bool


class _Flights:
    """What other engines work on, and what that keeps alive.

    Args:
        dies: the step in which each copy dies, as far as is known; kept up to date here.
    """

    def __init__(self, dies: Integers) -> None:
        self.dies = dies
        self.uses: dict[int, frozenset[int]] = {}  # copy that is being written -> all that must stay until it is

    def start(self, step: int, reads: Iterable[int], writes: Iterable[int]) -> None:
        """An op is started; its reads are copies, and so are its writes."""
        reads, writes = tuple(reads), tuple(writes)
        uses = frozenset((*reads, *writes)).union(*(self.uses.get(copy, ()) for copy in reads))
        for copy in writes or (-step - 1,):  # where nothing is written there is nothing to wait for
            self.uses[copy] = uses

    def wait(self, step: int, copies: Iterable[int]) -> None:
        """Compute waits in a step for what these copies are made by."""
        for copy in copies:
            for used in self.uses.get(copy, ()):
                self.dies[used] = max(self.dies[used], step)
                self.uses.pop(used, None)

    def land(self, end: int) -> None:
        """What nobody waited for ends with the step."""
        for uses in self.uses.values():
            for used in uses:
                self.dies[used] = end


@dataclass(frozen=True, slots=True, eq=False)
class Lives:
    """All lifetimes of a schedule, in the order of their births, an array for each field of `Lifetime`."""

    storages: Integers
    born: Integers
    dies: Integers
    recomputed: Flags

    def __iter__(self) -> Iterator[Lifetime]:
        columns = (self.storages, self.born, self.dies, self.recomputed)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return (Lifetime(*row) for row in rows)

    def of(self, chosen: Flags) -> Lives:
        """Some of them."""
        return Lives(self.storages[chosen], self.born[chosen], self.dies[chosen], self.recomputed[chosen])


def lifetimes(graph: Graph, schedule: Schedule) -> Lives:
    """For each copy of a storage when it is written and when it is last used.

    A read is one of the copy written last before it. So with reads and writes sorted by storage and step, a copy is a
    write and the reads up to the next write, and the last of them is where it dies.
    """
    split, end, arrays = schedule.forward_steps, len(schedule) - 1, graph.arrays
    steps = np.arange(len(schedule))
    again = first_runs(graph, schedule)[schedule.array] != steps
    rows = schedule.array + len(graph.ops) * again
    if split < len(schedule):  # tangents appear
        steps = np.concatenate((steps[:split], [split], steps[split:]))
        rows = np.concatenate((rows[:split], [2 * len(graph.ops)], rows[split:]))
    read, reading = arrays.reads.of(rows)
    written, writing = arrays.writes.of(rows)

    copies, width = len(written), 2 * len(rows)
    order = np.argsort(np.concatenate((written * width + 2 * writing + 1, read * width + 2 * reading)))
    writes = np.flatnonzero(order < copies)
    lasts = order[np.append(writes, len(order))[1:] - 1]
    born, dies = steps[writing], np.empty(copies, np.int64)
    dies[order[writes]] = np.concatenate((born, steps[reading]))[lasts]

    first = np.full(len(graph.storages), -1)  # of each storage the first copy, which is handed out
    first[written[::-1]] = np.arange(copies - 1, -1, -1)
    _hold(graph, schedule, first, dies)
    if is_asynchronous(graph, schedule):
        copy = np.empty(len(order), np.int64)  # the one that is read, or written
        copy[order] = np.repeat(order[writes], np.diff(writes, append=len(order)))
        by_ops = np.flatnonzero(rows[writing] < 2 * len(graph.ops))  # no op writes the tangents
        uses = _by_step(copy[copies:], steps[reading], end), _by_step(by_ops, born[by_ops], end)
        _fly(graph, schedule, first.tolist(), dies, uses)
    recomputed = (rows >= len(graph.ops)) & (rows < len(graph.ops) + graph.plain_count)
    lives = Lives(written, born, dies, recomputed[writing])
    if not graph.replayed:
        return lives
    return lives.of(~arrays.replayed[written] | (dies > born))  # what exists to repeat an op only if one is repeated


def _hold(graph: Graph, schedule: Schedule, first: Integers, dies: Integers) -> None:
    """First copies that leave the step stay until they do."""

    def hold(storages: Sequence[int], step: int) -> None:
        if storages:
            copies = first[list(storages)]
            copies = copies[copies >= 0]
            dies[copies] = np.maximum(dies[copies], step)

    end = len(schedule) - 1
    hold(graph.outputs, end)
    hold(graph.updates, schedule.forward_steps - 1)
    if not graph.gradients_allocated:
        hold(graph.gradients, end)
        return
    for delivery in deliveries(graph, schedule):
        hold(delivery.gradients, delivery.step)


def _by_step(copies: Integers, steps: Integers, end: int) -> list[list[int]]:
    """Copies by the steps in which they are used."""
    used: list[list[int]] = [[] for _ in range(end + 1)]
    for copy, step in zip(copies.tolist(), steps.tolist(), strict=True):
        used[step].append(copy)
    return used


def _fly(
    graph: Graph, schedule: Schedule, first: Sequence[int], dies: Integers, uses: tuple[list[list[int]], ...]
) -> None:
    """Let copies live as long as other engines work on them.

    Args:
        first: for each storage its first copy.
        dies: the step in which each copy dies as far as compute goes; changed here.
        uses: for each step the copies that it reads, and those that it writes.
    """
    flights, leaving = _Flights(dies), departures(graph, schedule)
    for step, (index, read, written) in enumerate(zip(schedule.order, *uses, strict=True)):
        if index in graph.asynchronous:
            flights.start(step, read, written)
        else:
            flights.wait(step, read)
        flights.wait(step, (first[s] for s in leaving.get(step, ()) if first[s] >= 0))
    flights.land(len(schedule) - 1)
