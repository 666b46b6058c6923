"""From when to when each copy of a storage is in memory: a matter of the order alone, whatever takes how long.

An op that another engine than compute carries out is only started where it stands. What it reads and writes is in use
until compute waits for it: at the first compute op that reads what it wrote, or what was made from that on other
engines, where it leaves the step, or else at the step's end. So an op that takes no time and reads the copy on the host
is the place where the original is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


def lifetimes(graph: Graph, schedule: Schedule) -> tuple[Lifetime, ...]:
    """Walk the schedule once and note for each copy of a storage when it is written and when it is last used."""
    split, end = schedule.forward_steps, len(schedule) - 1
    storages: list[int] = []
    born: list[int] = []
    dies: list[int] = []
    recomputed: list[bool] = []
    current: dict[int, int] = {}  # storage -> its most recent copy
    first: dict[int, int] = {}  # storage -> its first copy, the one that is handed out
    executed: set[int] = set()
    plain_count, flying = graph.plain_count, is_asynchronous(graph, schedule)
    flights, leaving = _Flights(dies), departures(graph, schedule) if flying else {}

    def write(storage: int, step: int, again: bool) -> None:
        current[storage] = len(storages)
        first.setdefault(storage, len(storages))
        storages.append(storage)
        born.append(step)
        dies.append(step)
        recomputed.append(again)

    for step, index in enumerate(schedule.order):
        if step == split:
            for storage, info in enumerate(graph.storages):
                if info.kind == "tangent":
                    write(storage, step, again=False)
        op = graph.ops[index]
        again = index in executed
        executed.add(index)
        for storage in op.reads:
            if storage in current:  # what is there before the step has no copies
                dies[current[storage]] = step
        for storage in op.replay:
            if again:
                dies[current[storage]] = step
            else:
                write(storage, step, again=False)
        used = [current[s] for s in (*op.reads, *(op.replay if again else ())) if s in current] if flying else []
        again = again and index < plain_count
        for storage in op.writes:
            write(storage, step, again)
        if flying:
            if index in graph.asynchronous:
                flights.start(step, used, (current[s] for s in op.writes))
            else:
                flights.wait(step, used)
            flights.wait(step, (first[s] for s in leaving.get(step, ()) if s in first))

    for storage in graph.outputs:
        if storage in first:
            dies[first[storage]] = end
    for storage in graph.updates:
        if storage in first:
            dies[first[storage]] = max(dies[first[storage]], split - 1)
    if graph.gradients_allocated:
        for delivery in deliveries(graph, schedule):
            for storage in delivery.gradients:
                dies[first[storage]] = max(dies[first[storage]], delivery.step)
    else:
        for storage in graph.gradients:
            if storage in first:
                dies[first[storage]] = end
    flights.land(end)
    unread = graph.replayed
    return tuple(
        Lifetime(*life)
        for life in zip(storages, born, dies, recomputed, strict=True)
        if life[0] not in unread or life[2] > life[1]
    )
