"""What a schedule costs: the one place where bytes and time are added up.

Semantics, exactly those of the emitted graphs: an op allocates what it writes and its workspace while all it reads is
live; after it, every storage that nothing reads any more is freed. Parameters, buffers and inputs are there all the
time, outputs from the moment they are written, tangents from the start of backward until their last reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import fsum
from typing import Literal

import numpy as np
import numpy.typing as npt

from fxckpt.core import schedule as schedules
from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.schedule import Schedule

PeakKind = Literal[
    "parameters and buffers",
    "gradients",
    "inputs and outputs",
    "saved",
    "recomputed",
    "temporaries",
    "reserved",
]
PEAK_KINDS: tuple[PeakKind, ...] = PeakKind.__args__  # type: ignore[attr-defined]
_LARGE = 0.2  # of the peak: a single tensor of this size is worth naming


@dataclass(frozen=True, slots=True)
class Lifetime:
    """One copy of a storage: live from step `born` to step `dies`, both included.

    `born` is -1 for nothing here: what is there before the step is not a lifetime (see `Graph.static_bytes`).
    """

    storage: int
    born: int
    dies: int
    recomputed: bool


@dataclass(frozen=True)
class Timeline:
    """Memory and time of a schedule, step by step. Equal if graph and schedule are: all else follows from these.

    Attributes:
        graph, schedule: what was simulated.
        lifetimes: every copy of every storage that the step allocates.
        live_bytes: bytes in use during each step, workspace included; shape (steps,) [B].
        step_us: time of the whole step [µs].
        recompute_us: the part of it that repeats ops [µs].
    """

    graph: Graph
    schedule: Schedule
    lifetimes: tuple[Lifetime, ...] = field(compare=False)
    live_bytes: npt.NDArray[np.int64] = field(compare=False)
    step_us: float = field(compare=False)
    recompute_us: float = field(compare=False)

    @cached_property
    def peak_step(self) -> int:
        """The first step at which most bytes are in use; -1 in an empty schedule."""
        return int(self.live_bytes.argmax()) if len(self.live_bytes) else -1

    @cached_property
    def peak_bytes(self) -> int:
        """The most bytes in use at any step [B]."""
        return int(self.live_bytes.max()) if len(self.live_bytes) else self.graph.static_bytes

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """Storages that live from forward into backward only because backward reads them."""
        split = self.schedule.forward_steps
        outputs = frozenset(self.graph.outputs)
        return tuple(x.storage for x in self.lifetimes if x.born < split <= x.dies and x.storage not in outputs)

    @cached_property
    def saved_bytes(self) -> int:
        """Bytes of `saved` [B]."""
        return self.graph.bytes_of(self.saved)

    def alive_at(self, step: int) -> list[Lifetime]:
        """The lifetimes that contain a step."""
        return [x for x in self.lifetimes if x.born <= step <= x.dies]

    def breakdown(self, step: int) -> dict[PeakKind, int]:
        """Bytes in use at a step by what they are for; the sum is `live_bytes[step]` [B]."""
        if step < 0:
            return self._static_bytes_by_kind()
        return {kind: int(series[step]) for kind, series in self.live_bytes_by_kind.items()}

    @cached_property
    def at_peak(self) -> dict[PeakKind, int]:
        """Bytes in use at the peak by what they are for; the sum is `peak_bytes` [B]."""
        return self.breakdown(self.peak_step)

    @property
    def dominant(self) -> PeakKind:
        """What takes the most of them."""
        return max(PEAK_KINDS, key=lambda kind: self.at_peak[kind])

    @cached_property
    def largest(self) -> int | None:
        """The largest storage at the peak that the step itself allocates, if it is a fifth of the peak or more."""
        storages = self.graph.storages
        alive = (life.storage for life in self.alive_at(self.peak_step))
        largest = max(alive, key=lambda storage: storages[storage].size_bytes, default=None)
        if largest is None or storages[largest].size_bytes < _LARGE * self.peak_bytes:
            return None
        return largest

    @cached_property
    def live_bytes_by_kind(self) -> dict[PeakKind, npt.NDArray[np.int64]]:
        """`live_bytes` by what they are for: one array of shape (steps,) a kind, which add up to it [B]."""
        graph, steps = self.graph, len(self.schedule)
        change = {kind: np.zeros(steps + 1, dtype=np.int64) for kind in PEAK_KINDS}
        for kind, size_bytes in self._static_bytes_by_kind().items():
            change[kind][0] += size_bytes
        for kind, life in zip(self.kinds, self.lifetimes, strict=True):
            change[kind][life.born] += graph.storages[life.storage].size_bytes
            change[kind][life.dies + 1] -= graph.storages[life.storage].size_bytes
        live_bytes = {kind: np.cumsum(series[:steps]) for kind, series in change.items()}
        live_bytes["temporaries"] += _workspace_bytes(graph, self.schedule)
        return live_bytes

    @cached_property
    def kinds(self) -> tuple[PeakKind, ...]:
        """What each of `lifetimes` is for."""
        outputs, gradients = frozenset(self.graph.outputs), frozenset(self.graph.gradients)

        def kind(life: Lifetime) -> PeakKind:
            storage = self.graph.storages[life.storage]
            if life.storage in gradients:
                return "gradients"
            if life.storage in outputs or storage.kind == "tangent":
                return "inputs and outputs"
            if life.recomputed:
                return "recomputed"
            kept = storage.kind == "activation" and life.dies >= self.schedule.forward_steps
            return "saved" if kept else "temporaries"

        return tuple(map(kind, self.lifetimes))

    @cached_property
    def start_us(self) -> npt.NDArray[np.float64]:
        """When each step starts, and at the end when the last one ends; shape (steps + 1,) [µs]."""
        times = np.fromiter((self.graph.ops[i].time_us for i in self.schedule.order), np.float64, len(self.schedule))
        return np.concatenate(([0.0], np.cumsum(times)))

    def _static_bytes_by_kind(self) -> dict[PeakKind, int]:
        """What is there during the whole step; the sum is `Graph.static_bytes` [B]."""
        graph = self.graph
        sums = dict.fromkeys(PEAK_KINDS, 0)
        for storage in graph.storages:
            if storage.kind in RESIDENT:
                kind: PeakKind = "inputs and outputs" if storage.kind == "input" else "parameters and buffers"
                sums[kind] += storage.size_bytes
        sums["reserved"] = graph.reserved_bytes
        sums["gradients"] = graph.allocated_gradient_bytes if graph.gradients_allocated else 0
        return sums


@dataclass(frozen=True)
class Figures:
    """Predicted cost of one training step.

    Attributes:
        peak_bytes: most bytes in use at any moment, everything counted [B].
        step_us: time of the step by the cost model [µs].
        recompute_us: the part of it that repeats ops [µs].
        saved_bytes: what forward keeps for backward, parameters and outputs aside [B].
    """

    peak_bytes: int
    step_us: float
    recompute_us: float
    saved_bytes: int

    @classmethod
    def of(cls, timeline: Timeline) -> Figures:
        """The figures of a simulation."""
        return cls(timeline.peak_bytes, timeline.step_us, timeline.recompute_us, timeline.saved_bytes)


def simulate(graph: Graph, schedule: Schedule) -> Timeline:
    """Bytes and time of a schedule.

    Raises:
        InvalidScheduleError: see `fxckpt.core.schedule.check`.
    """
    schedules.check(graph, schedule)
    lifetimes = _lifetimes(graph, schedule)
    steps = len(schedule)
    change = np.zeros(steps + 1, dtype=np.int64)
    for life in lifetimes:
        size_bytes = graph.storages[life.storage].size_bytes
        change[life.born] += size_bytes
        change[life.dies + 1] -= size_bytes
    step_us = fsum(graph.ops[i].time_us for i in schedule.order)  # the same in whatever order
    recompute_us = fsum(graph.ops[i].time_us * count for i, count in schedule.repeats().items())
    live_bytes = graph.static_bytes + np.cumsum(change[:steps]) + _workspace_bytes(graph, schedule)
    return Timeline(graph, schedule, lifetimes, live_bytes, step_us, recompute_us)


def _workspace_bytes(graph: Graph, schedule: Schedule) -> npt.NDArray[np.int64]:
    return np.fromiter((graph.ops[i].workspace_bytes for i in schedule.order), np.int64, len(schedule))


def _lifetimes(graph: Graph, schedule: Schedule) -> tuple[Lifetime, ...]:
    """Walk the schedule once and note for each copy of a storage when it is written and when it is last read."""
    split, end = schedule.forward_steps, len(schedule) - 1
    storages: list[int] = []
    born: list[int] = []
    dies: list[int] = []
    recomputed: list[bool] = []
    current: dict[int, int] = {}  # storage -> its most recent copy
    first: dict[int, int] = {}  # storage -> its first copy, the one that is handed out
    executed: set[int] = set()

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
        for storage in op.writes:
            write(storage, step, again)

    for storage in graph.outputs:
        if storage in first:
            dies[first[storage]] = end
    for storage in graph.updates:
        if storage in first:
            dies[first[storage]] = max(dies[first[storage]], split - 1)
    if graph.gradients_allocated:
        for delivery in schedules.deliveries(graph, schedule):
            for storage in delivery.gradients:
                dies[first[storage]] = max(dies[first[storage]], delivery.step)
    else:
        for storage in graph.gradients:
            if storage in first:
                dies[first[storage]] = end
    unread = graph.replayed
    return tuple(
        Lifetime(*life)
        for life in zip(storages, born, dies, recomputed, strict=True)
        if life[0] not in unread or life[2] > life[1]
    )
