"""A plan of execution: an order of ops in which an op may stand more than once.

An op that stands again is recomputed. Everything else (what is saved, when memory is freed) follows from the order:
a read means the most recent execution of the op that writes the storage, and a storage dies at its last reader.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fxckpt.core.arrays import Integers
from fxckpt.core.graph import Graph
from fxckpt.errors import InvalidScheduleError


@dataclass(frozen=True)
class Schedule:
    """An execution order.

    Attributes:
        order: indices into `Graph.ops`.
        forward_steps: the first `forward_steps` entries run in forward, the rest in backward.
    """

    order: tuple[int, ...]
    forward_steps: int

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def array(self) -> Integers:
        """`order` as an array.

        Raises:
            InvalidScheduleError: it is not one of whole numbers, or of such that no graph has as many ops.
        """
        array = np.array(self.order) if self.order else np.zeros(0, np.int64)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise InvalidScheduleError("the order of a schedule is one of indices of ops, whole numbers")
        return array.astype(np.int64, copy=False)

    def repeats(self) -> dict[int, int]:
        """For each op that runs more than once, how often it is repeated."""
        return {op: count - 1 for op, count in Counter(self.order).items() if count > 1}

    def repeated_steps(self) -> list[int]:
        """The steps that run an op which has run before."""
        seen: set[int] = set()
        steps = []
        for step, op in enumerate(self.order):
            if op in seen:
                steps.append(step)
            seen.add(op)
        return steps


def plain(graph: Graph) -> Schedule:
    """Every plain op once, in the order of the plain model."""
    return Schedule(tuple(range(graph.plain_count)), graph.forward_count)


def is_asynchronous(graph: Graph, schedule: Schedule) -> bool:
    """Whether another engine than compute carries out any of its steps."""
    return bool(graph.asynchronous) and not graph.asynchronous.isdisjoint(schedule.order)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Gradients handed over together: after step `step` of the schedule, the storages `gradients`."""

    step: int
    gradients: tuple[int, ...]


def deliveries(graph: Graph, schedule: Schedule) -> list[Delivery]:
    """Where in backward gradients leave, and which.

    Backward runs in stages. A stage ends where `Graph.stage_bytes` of finished gradients are waiting, and at the end.
    What another engine than compute writes is finished at the first compute op that reads it.
    """
    gradients = frozenset(graph.gradients)
    start, last, flying = schedule.forward_steps, len(schedule) - 1, is_asynchronous(graph, schedule)
    waiting = [s for s in graph.gradients if graph.storages[s].kind != "backward"]  # a tangent that is passed through
    waiting_bytes = graph.bytes_of(waiting)
    seen = set(waiting)
    stages: list[Delivery] = []
    for step in range(start, last + 1):
        if not flying and schedule.order[step] not in graph.gradient_ops and step not in (start, last):
            continue
        finished = _finished(graph, schedule, step) if flying else graph.ops[schedule.order[step]].writes
        for storage in finished:
            if storage in gradients and storage not in seen:
                seen.add(storage)
                waiting.append(storage)
                waiting_bytes += graph.storages[storage].size_bytes
        if waiting and (waiting_bytes >= graph.stage_bytes or step == last):
            stages.append(Delivery(step, tuple(waiting)))
            waiting, waiting_bytes = [], 0
    return stages


def _finished(graph: Graph, schedule: Schedule, step: int) -> tuple[int, ...]:
    """What compute may use from a step on: what it wrote itself, and what it has waited for."""
    index = schedule.order[step]
    op = graph.ops[index]
    if step < len(schedule) - 1:
        return () if index in graph.asynchronous else (*op.writes, *op.reads)
    ran = dict.fromkeys(schedule.order[schedule.forward_steps :])
    return tuple(dict.fromkeys(s for i in ran for s in graph.ops[i].writes))


def departures(graph: Graph, schedule: Schedule) -> dict[int, tuple[int, ...]]:
    """After which step which storages leave: outputs and updates when forward ends, gradients with their delivery."""
    leaving = {schedule.forward_steps - 1: (*graph.outputs, *graph.updates)}
    return leaving | {delivery.step: delivery.gradients for delivery in deliveries(graph, schedule)}


def check(graph: Graph, schedule: Schedule) -> None:
    """Check that a schedule computes what the plain step computes.

    Raises:
        InvalidScheduleError: an op reads what is not there, a backward op runs in forward, an op that must not be
            repeated is, ordered ops change places, are left out or wait for backward, or an output, update or gradient
            is never written.
    """
    split, steps, arrays = schedule.forward_steps, len(schedule), graph.arrays
    if not 0 <= split <= steps:
        raise InvalidScheduleError(f"forward_steps is {split} of {steps} steps")
    order = schedule.array
    nowhere = np.flatnonzero((order < 0) | (order >= len(graph.ops)))
    if len(nowhere):
        step = int(nowhere[0])
        raise InvalidScheduleError(f"step {step} names op {order[step]}, but there are {len(graph.ops)}")
    first = first_runs(graph, schedule)
    written = np.where(arrays.resident, -1, steps)  # the step in which each storage is written first
    np.minimum.at(written, arrays.written, first[arrays.writing])
    available = np.where(arrays.tangent, split - 1, written)

    again = first[order] != np.arange(steps)
    backward = (order[:split] >= graph.forward_count) & (order[:split] < graph.plain_count)
    unready = first[arrays.reading[available[arrays.read] >= first[arrays.reading]]]
    wrong = np.concatenate((np.flatnonzero(backward), np.flatnonzero(again & arrays.pinned[order]), unready))
    step = int(wrong.min(initial=steps))
    if step < split:
        raise _wrong_step(graph, schedule, step, available)
    _check_written(graph, written, split, (*graph.outputs, *graph.updates), "forward ends")
    ordered = arrays.ordered
    _check_executed(graph, ordered[(ordered < graph.forward_count) & (first[ordered] >= split)], "forward ends")
    if step < steps:
        raise _wrong_step(graph, schedule, step, available)
    _check_written(graph, available, steps, graph.gradients, "backward ends")
    _check_executed(graph, ordered[first[ordered] == steps], "backward ends")
    turned = np.flatnonzero(np.diff(first[ordered]) < 0)
    if len(turned):
        names = (graph.ops[i].name for i in ordered[turned[0] : turned[0] + 2])
        raise InvalidScheduleError(f"{' must run before '.join(names)}: both draw random numbers or have effects")


def first_runs(graph: Graph, schedule: Schedule) -> Integers:
    """For each op the step in which it runs first; the number of steps if it never does."""
    steps = len(schedule)
    first = np.full(len(graph.ops), steps)
    first[schedule.array[::-1]] = np.arange(steps - 1, -1, -1)  # of several the last one written stays
    return first


def _wrong_step(graph: Graph, schedule: Schedule, step: int, available: Integers) -> InvalidScheduleError:
    """What is wrong with a step, if all before it are right."""
    index = schedule.order[step]
    op = graph.ops[index]
    if step < schedule.forward_steps and graph.forward_count <= index < graph.plain_count:
        return InvalidScheduleError(f"step {step} runs the backward op {op.name} in forward")
    if op.pinned and index in schedule.order[:step]:
        return InvalidScheduleError(f"step {step} repeats {op.name}, which must run once: {op.pinned}")
    name = graph.storages[next(s for s in op.reads if available[s] >= step)].name
    return InvalidScheduleError(f"step {step} runs {op.name}, which reads {name} before anything writes it")


def _check_executed(graph: Graph, missing: Integers, when: str) -> None:
    if len(missing):
        name = graph.ops[missing[0]].name
        raise InvalidScheduleError(f"{when}, but {name}, which draws random numbers or has an effect, never ran")


def _check_written(graph: Graph, written: Integers, step: int, needed: tuple[int, ...], when: str) -> None:
    missing = [graph.storages[s].name for s in needed if written[s] >= step]
    if missing:
        raise InvalidScheduleError(f"{when}, but nothing wrote {missing[0]}")
