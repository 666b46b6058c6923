"""What a schedule costs: the one place where bytes and time are added up.

Semantics, exactly those of the emitted graphs: an op allocates what it writes and its workspace while all it reads is
live; after it, every storage that nothing reads any more is freed. Parameters, buffers and inputs are there all the
time, outputs from the moment they are written, tangents from the start of backward until their last reader. Bytes
follow from the order alone (`core.lifetimes`), time from the clocks of the engines (`core.engines`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import fsum
from typing import Literal

import numpy as np
import numpy.typing as npt

from fxckpt.core import engines
from fxckpt.core import schedule as schedules
from fxckpt.core.arrays import Integers
from fxckpt.core.engines import Clocks, Times
from fxckpt.core.graph import RESIDENT, Graph, Place
from fxckpt.core.lifetimes import Lifetime, Lives, lifetimes
from fxckpt.core.schedule import Schedule

PeakKind = Literal[
    "parameters and buffers",
    "gradients",
    "inputs and outputs",
    "saved",
    "recomputed",
    "temporaries",
    "libraries",
    "reserved",
]
PEAK_KINDS: tuple[PeakKind, ...] = PeakKind.__args__  # type: ignore[attr-defined]
_LARGE = 0.2  # of the peak: a single tensor of this size is worth naming


@dataclass(frozen=True)
class Timeline:
    """Memory and time of a schedule, step by step. Equal if graph and schedule are: all else follows from these.

    Attributes:
        graph, schedule: what was simulated.
        lives: every copy of every storage that the step allocates, as arrays.
        live_bytes: bytes of the device in use during each step, workspace included; shape (steps,) [B].
        step_us: time of the whole step [µs].
        recompute_us: the part of it that computes what the plain step has computed or does not need [µs].
    """

    graph: Graph
    schedule: Schedule
    lives: Lives = field(compare=False, repr=False)
    live_bytes: npt.NDArray[np.int64] = field(compare=False)
    step_us: float = field(compare=False)
    recompute_us: float = field(compare=False)

    @cached_property
    def lifetimes(self) -> tuple[Lifetime, ...]:
        """Every copy of every storage that the step allocates."""
        return tuple(self.lives)

    @cached_property
    def peak_step(self) -> int:
        """The first step at which most bytes are in use; -1 in an empty schedule."""
        return int(self.live_bytes.argmax()) if len(self.live_bytes) else -1

    @cached_property
    def peak_bytes(self) -> int:
        """The most bytes of the device in use at any step [B]."""
        return int(self.live_bytes.max()) if len(self.live_bytes) else self.graph.static_bytes

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """Storages that take the device's memory from forward into backward only because backward reads them."""
        split, storages = self.schedule.forward_steps, self.graph.storages
        outputs = frozenset(self.graph.outputs)
        lasting = self.lives.storages[(self.lives.born < split) & (self.lives.dies >= split)].tolist()
        return tuple(s for s in lasting if s not in outputs and storages[s].place == "device")

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
        sizes_bytes = self.graph.sizes_bytes("device")
        alive = (life.storage for life in self.alive_at(self.peak_step))
        largest = max(alive, key=lambda storage: sizes_bytes[storage], default=None)
        return None if largest is None or sizes_bytes[largest] < _LARGE * self.peak_bytes else largest

    @cached_property
    def live_bytes_by_kind(self) -> dict[PeakKind, npt.NDArray[np.int64]]:
        """`live_bytes` by what they are for: one array of shape (steps,) a kind, which add up to it [B]."""
        steps, sizes_bytes, kinds = len(self.schedule), self.graph.arrays.device_bytes, np.array(self.kinds)
        static_bytes = self._static_bytes_by_kind()
        live_bytes = {
            kind: static_bytes[kind] + _sums(self.lives.of(kinds == kind), sizes_bytes, steps) for kind in PEAK_KINDS
        }
        live_bytes["temporaries"] += self.graph.arrays.workspace_bytes[self.schedule.array]
        return live_bytes

    def live_bytes_at(self, place: Place) -> npt.NDArray[np.int64]:
        """Bytes of a memory in use during each step, `live_bytes` of the device; shape (steps,) [B]."""
        if place == "device":
            return self.live_bytes
        sizes_bytes = np.array(self.graph.sizes_bytes(place), dtype=np.int64)
        return self.graph.given_bytes(place) + _sums(self.lives, sizes_bytes, len(self.schedule))

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
    def clocks(self) -> Clocks:
        """When each step starts and ends, by engine."""
        return engines.clocks(self.graph, self.schedule)

    @property
    def start_us(self) -> Times:
        """When each step starts, and at the end when the last one ends; shape (steps + 1,) [µs]."""
        return self.clocks.start_us

    def _static_bytes_by_kind(self) -> dict[PeakKind, int]:
        """What is there during the whole step; the sum is `Graph.static_bytes` [B]."""
        graph = self.graph
        sums = dict.fromkeys(PEAK_KINDS, 0)
        for storage in graph.storages:
            if storage.kind in RESIDENT and storage.place == "device":
                kind: PeakKind = "inputs and outputs" if storage.kind == "input" else "parameters and buffers"
                sums[kind] += storage.size_bytes
        sums["reserved"] = graph.reserved_bytes
        sums["libraries"] = graph.library_bytes
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
    return walk(graph, schedule)


def walk(graph: Graph, schedule: Schedule) -> Timeline:
    """As `simulate`, for a schedule that is known to be valid."""
    lives = lifetimes(graph, schedule)
    live_bytes = _sums(lives, graph.arrays.device_bytes, len(schedule))
    live_bytes += graph.static_bytes + graph.arrays.workspace_bytes[schedule.array]
    return Timeline(
        graph, schedule, lives, live_bytes, engines.step_us(graph, schedule), _recompute_us(graph, schedule)
    )


def _sums(lives: Lives, sizes_bytes: Integers, steps: int) -> Integers:
    """Bytes of all that is live in each step [B]."""
    sizes_bytes = sizes_bytes[lives.storages]
    change = np.zeros(steps + 1, dtype=np.int64)
    np.add.at(change, lives.born, sizes_bytes)
    np.subtract.at(change, lives.dies + 1, sizes_bytes)
    return np.cumsum(change[:steps])


def _recompute_us(graph: Graph, schedule: Schedule) -> float:
    """Time of what compute runs beyond the plain step [µs]."""
    counts = np.bincount(schedule.array, minlength=len(graph.ops))
    again = np.maximum(counts - 1, 0)
    again[graph.plain_count :] = counts[graph.plain_count :]
    again[list(graph.asynchronous)] = 0
    repeated = np.flatnonzero(again)
    return fsum((graph.arrays.times_us[repeated] * again[repeated]).tolist())
