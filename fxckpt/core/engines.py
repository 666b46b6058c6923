"""When things happen: one clock for each engine, in one pass over a schedule.

Each engine carries out its ops one after the other, in the schedule's order. A compute op waits for what it reads. An
op of another engine is started when compute gets to where it stands, waits for its own engine and for what it reads,
and runs beside what comes after it. Compute waits for it at the first op that reads what it wrote, and where that
leaves the step. With compute alone all this is adding up times.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
import numpy.typing as npt

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, departures, is_asynchronous

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clocks:
    """The hours of a step.

    Attributes:
        start_us: when each step starts (of another engine than compute: when compute gets to it), and at the end when
            the last one ends; shape (steps + 1,) [µs].
        end_us: when each step ends; shape (steps,) [µs].
        step_us: time of the whole step [µs].
        waiting_us: the part of it in which compute waits for other engines, the end aside [µs].
    """

    start_us: Times
    end_us: Times
    step_us: float
    waiting_us: float


def step_us(graph: Graph, schedule: Schedule) -> float:
    """Time of a whole step [µs]; with compute alone the same in whatever order."""
    if is_asynchronous(graph, schedule):
        return clocks(graph, schedule).step_us
    return fsum(graph.arrays.times_us[schedule.array].tolist())


def clocks(graph: Graph, schedule: Schedule) -> Clocks:
    """The hours of a schedule, supposed to be valid."""
    if not is_asynchronous(graph, schedule):
        sums = np.concatenate(([0.0], np.cumsum(graph.arrays.times_us[schedule.array])))
        return Clocks(sums, sums[1:], step_us(graph, schedule), 0.0)
    start_us: list[float] = []
    end_us: list[float] = []
    now = 0.0  # when compute is free
    free: dict[str, float] = {}  # when another engine is
    ready: dict[int, float] = {}  # storage -> when its most recent copy is written, if another engine does
    first: dict[int, float] = {}  # storage -> when its first copy is, the one that is handed out
    worked: list[float] = []
    waited: list[float] = []
    leaving = departures(graph, schedule)
    for step, index in enumerate(schedule.order):
        op = graph.ops[index]
        there = max((ready[s] for s in op.reads if s in ready), default=0.0)
        if op.engine == "compute":
            waited.append(max(there - now, 0.0))
            worked.append(op.time_us)
            start_us.append(max(now, there))
            now = end = start_us[-1] + op.time_us
            for storage in op.writes:
                ready.pop(storage, None)
        else:
            start_us.append(now)
            end = free[op.engine] = max(now, there, free.get(op.engine, 0.0)) + op.time_us
            ready |= dict.fromkeys(op.writes, end)
        end_us.append(end)
        for storage in op.writes:
            first.setdefault(storage, end)
        left = max((first[s] for s in leaving.get(step, ()) if s in first), default=0.0)
        waited.append(max(left - now, 0.0))
        now = max(now, left)
    last = max(free.values())
    start_us.append(max(now, last))
    return Clocks(np.array(start_us), np.array(end_us), max(fsum((*worked, *waited)), last), fsum(waited))
