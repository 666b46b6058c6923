"""From a set of kept storages to a schedule: single-level checkpointing, as eager frameworks do it.

Forward runs once. Backward runs in its own order; before a backward op that reads a forward value which was not kept,
the ops that make it again run, starting from what is kept or has been made again already. A value that has been made
again stays until its last reader, so nothing is repeated twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Timeline, simulate


def schedule_keeping(graph: Graph, kept: Collection[int]) -> Schedule:
    """The schedule in which forward keeps the storages `kept` for backward and everything else is recomputed.

    Outputs are kept in any case, since they stay alive, and so is what ops write that must not be repeated.
    """
    live = {*kept, *graph.outputs, *pinned_storages(graph)}
    backward = recomputing(graph, range(graph.forward_count, graph.plain_count), live)
    return Schedule((*range(graph.forward_count), *backward), graph.forward_count)


def recomputing(graph: Graph, backward: Iterable[int], live: Collection[int]) -> list[int]:
    """Backward ops, each after the forward ops that must run again for it when the storages `live` are there."""
    there = set(live)
    order: list[int] = []
    for index in backward:
        if there.issuperset(graph.forward_reads[index]):
            order.append(index)
            continue
        again = closure(graph, graph.forward_reads[index], there)
        there.update(s for op in again for s in graph.ops[op].writes)
        order += [*again, index]
    return order


def closure(graph: Graph, needed: Iterable[int], live: Collection[int]) -> list[int]:
    """The forward ops to run, in order, to have all storages `needed` when those in `live` are there."""
    ops: set[int] = set()
    producer, count = graph.producer, graph.forward_count
    pending = list(needed)
    while pending:
        storage = pending.pop()
        op = producer[storage]
        if 0 <= op < count and storage not in live and op not in ops:
            ops.add(op)
            pending += graph.forward_reads[op]
    return sorted(ops)


def pinned_storages(graph: Graph) -> frozenset[int]:
    """What the forward ops write that must not be repeated."""
    return frozenset(s for op in graph.ops[: graph.forward_count] if op.pinned for s in op.writes)


def cheapest_fitting(graph: Graph, schedules: Iterable[Schedule], budget_bytes: int) -> Schedule:
    """Of several schedules the one that `fastest_fitting` takes."""
    return fastest_fitting((simulate(graph, schedule) for schedule in schedules), budget_bytes).schedule


def fastest_fitting(timelines: Iterable[Timeline], budget_bytes: int) -> Timeline:
    """The fastest of those whose peak is within the budget, or the one of lowest peak if there is none.

    Ties go to the lower peak, then to the earlier one.

    Raises:
        ValueError: there are no timelines.
    """

    def rank(timeline: Timeline) -> tuple[int, float, float]:
        peak_bytes, step_us = timeline.peak_bytes, timeline.step_us
        return (0, step_us, peak_bytes) if peak_bytes <= budget_bytes else (1, peak_bytes, step_us)

    return min(timelines, key=rank)
