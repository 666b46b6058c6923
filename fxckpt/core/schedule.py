"""A plan of execution: an order of ops in which an op may stand more than once.

An op that stands again is recomputed. Everything else (what is saved, when memory is freed) follows from the order:
a read means the most recent execution of the op that writes the storage, and a storage dies at its last reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from fxckpt.core.graph import RESIDENT, Graph
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
    start, flying = schedule.forward_steps, is_asynchronous(graph, schedule)
    waiting = [s for s in graph.gradients if graph.storages[s].kind != "backward"]  # a tangent that is passed through
    waiting_bytes = graph.bytes_of(waiting)
    seen = set(waiting)
    stages: list[Delivery] = []
    for step in range(start, len(schedule)):
        finished = graph.ops[schedule.order[step]].writes
        if flying:
            finished = _finished(graph, schedule, step)
        for storage in finished:
            if storage in gradients and storage not in seen:
                seen.add(storage)
                waiting.append(storage)
                waiting_bytes += graph.storages[storage].size_bytes
        if waiting and (waiting_bytes >= graph.stage_bytes or step == len(schedule) - 1):
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
    if not 0 <= schedule.forward_steps <= len(schedule):
        raise InvalidScheduleError(f"forward_steps is {schedule.forward_steps} of {len(schedule)} steps")
    available = {i for i, s in enumerate(graph.storages) if s.kind in RESIDENT}
    executed: set[int] = set()
    ops, count = graph.ops, len(graph.ops)
    for step, index in enumerate(schedule.order):
        if not 0 <= index < count:
            raise InvalidScheduleError(f"step {step} names op {index}, but there are {len(graph.ops)}")
        if step == schedule.forward_steps:
            _check_forward_ended(graph, available, executed)
            available |= {i for i, s in enumerate(graph.storages) if s.kind == "tangent"}
        op = ops[index]
        if step < schedule.forward_steps and graph.forward_count <= index < graph.plain_count:
            raise InvalidScheduleError(f"step {step} runs the backward op {op.name} in forward")
        if index in executed and op.pinned:
            raise InvalidScheduleError(f"step {step} repeats {op.name}, which must run once: {op.pinned}")
        if not available.issuperset(op.reads):
            name = graph.storages[next(s for s in op.reads if s not in available)].name
            raise InvalidScheduleError(f"step {step} runs {op.name}, which reads {name} before anything writes it")
        executed.add(index)
        available.update(op.writes)
    if len(schedule) == schedule.forward_steps:
        _check_forward_ended(graph, available, executed)
    _check_written(graph, available | _tangents(graph), graph.gradients, "backward ends")
    _check_executed(graph, range(graph.plain_count), executed, "backward ends")
    for first, second in pairwise(_ordered_first_runs(graph, schedule)):
        if first > second:
            names = graph.ops[second].name, graph.ops[first].name
            raise InvalidScheduleError(
                f"{names[0]} must run before {names[1]}: both draw random numbers or have effects"
            )


def _tangents(graph: Graph) -> set[int]:
    return {i for i, s in enumerate(graph.storages) if s.kind == "tangent"}


def _check_forward_ended(graph: Graph, available: set[int], executed: set[int]) -> None:
    _check_written(graph, available, (*graph.outputs, *graph.updates), "forward ends")
    _check_executed(graph, range(graph.forward_count), executed, "forward ends")


def _check_executed(graph: Graph, ops: range, executed: set[int], when: str) -> None:
    missing = [graph.ops[i].name for i in ops if graph.ops[i].ordered and i not in executed]
    if missing:
        raise InvalidScheduleError(f"{when}, but {missing[0]}, which draws random numbers or has an effect, never ran")


def _check_written(graph: Graph, available: set[int], needed: tuple[int, ...], when: str) -> None:
    missing = [graph.storages[s].name for s in needed if s not in available]
    if missing:
        raise InvalidScheduleError(f"{when}, but nothing wrote {missing[0]}")


def _ordered_first_runs(graph: Graph, schedule: Schedule) -> Iterator[int]:
    seen: set[int] = set()
    for index in schedule.order:
        if graph.ops[index].ordered and index not in seen:
            seen.add(index)
            yield index
