"""From when to when each copy of a storage is in memory: a matter of the order alone, whatever takes how long.

An op that another engine than compute carries out is only started where it stands. What it reads and writes is in use
until compute waits for it: at the first compute op that reads what it wrote, or what was made from that on other
engines, where it leaves the step, or else at the step's end. So an op that takes no time and reads the copy on the host
is the place where the original is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, deliveries, departures, is_asynchronous


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

    def __init__(self, dies: list[int]) -> None:
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


@dataclass(frozen=True, slots=True)
class Lives:
    """All lifetimes of a schedule, in the order of their births, a list for each field of `Lifetime`."""

    storages: list[int]
    born: list[int]
    dies: list[int]
    recomputed: list[bool]

    def __iter__(self) -> Iterator[Lifetime]:
        rows = zip(self.storages, self.born, self.dies, self.recomputed, strict=True)
        return (Lifetime(*row) for row in rows)


def lifetimes(graph: Graph, schedule: Schedule) -> Lives:
    """Walk the schedule once and note for each copy of a storage when it is written and when it is last used."""
    split, end = schedule.forward_steps, len(schedule) - 1
    storages: list[int] = []
    born: list[int] = []
    dies: list[int] = []
    recomputed: list[bool] = []
    current = [-1] * len(graph.storages)  # the most recent copy of each storage
    first = [-1] * len(graph.storages)  # the first one, which is handed out
    executed: set[int] = set()
    ops, plain_count, flying = graph.ops, graph.plain_count, is_asynchronous(graph, schedule)
    flights, leaving = _Flights(dies), departures(graph, schedule) if flying else {}

    def write(written: Iterable[int], step: int, again: bool) -> None:
        for storage in written:
            current[storage] = len(storages)
            if first[storage] < 0:
                first[storage] = len(storages)
            storages.append(storage)
            born.append(step)
            dies.append(step)
            recomputed.append(again)

    # Plans are searched for by walking some thousand schedules, so what is most frequent is written out here.
    for step, index in enumerate(schedule.order):
        if step == split:
            write((s for s, info in enumerate(graph.storages) if info.kind == "tangent"), step, False)
        op = ops[index]
        again = index in executed
        executed.add(index)
        for storage in op.reads:
            copy = current[storage]
            if copy >= 0:  # what is there before the step has no copies
                dies[copy] = step
        if op.replay:
            if again:
                for storage in op.replay:
                    dies[current[storage]] = step
            else:
                write(op.replay, step, False)
        used = [current[s] for s in (*op.reads, *(op.replay if again else ())) if current[s] >= 0] if flying else []
        again = again and index < plain_count
        for storage in op.writes:
            current[storage] = copy = len(storages)
            if first[storage] < 0:
                first[storage] = copy
            storages.append(storage)
            born.append(step)
            dies.append(step)
            recomputed.append(again)
        if flying:
            if index in graph.asynchronous:
                flights.start(step, used, (current[s] for s in op.writes))
            else:
                flights.wait(step, used)
            flights.wait(step, (first[s] for s in leaving.get(step, ()) if first[s] >= 0))

    for storage in graph.outputs:
        if first[storage] >= 0:
            dies[first[storage]] = end
    for storage in graph.updates:
        if first[storage] >= 0:
            dies[first[storage]] = max(dies[first[storage]], split - 1)
    if graph.gradients_allocated:
        for delivery in deliveries(graph, schedule):
            for storage in delivery.gradients:
                dies[first[storage]] = max(dies[first[storage]], delivery.step)
    else:
        for storage in graph.gradients:
            if first[storage] >= 0:
                dies[first[storage]] = end
    flights.land(end)
    return _without_unread(Lives(storages, born, dies, recomputed), graph.replayed)


def _without_unread(lives: Lives, replayed: frozenset[int]) -> Lives:
    """Of what exists to repeat an op, only what is read: that is not there in a schedule that does not repeat it."""
    if not replayed:
        return lives
    read = [
        storage not in replayed or dies > born
        for storage, born, dies in zip(lives.storages, lives.born, lives.dies, strict=True)
    ]
    return Lives(
        list(compress(lives.storages, read)),
        list(compress(lives.born, read)),
        list(compress(lives.dies, read)),
        list(compress(lives.recomputed, read)),
    )
