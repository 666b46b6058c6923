"""A better order for backward: gradients of weights where they hold least memory.

An op of backward whose results nothing else reads may run at any time after its inputs are there. Run it at once, and
the activations that it alone still needs are freed before the next gradients are made. But where its result is larger
than all that it reads, and stays (gradients are fresh), it should run as late as possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.schedule import Schedule


@dataclass(frozen=True)
class Reordered:
    """A graph with its backward ops in another order.

    Attributes:
        graph: the graph.
        order: for each of its ops the index in the original graph.
        held: activations that ops moved to the end still read there.
    """

    graph: Graph
    order: tuple[int, ...]
    held: frozenset[int] = frozenset()

    def restored(self, schedule: Schedule) -> Schedule:
        """A schedule of this graph as one of the original graph."""
        return replace(schedule, order=tuple(self.order[i] for i in schedule.order))

    def then(self, backward: Iterable[int]) -> Reordered:
        """Once more reordered: `backward` are the indices of this graph's backward ops."""
        graph = self.graph
        again = (*range(graph.forward_count), *backward, *range(graph.plain_count, len(graph.ops)))
        ordered = replace(graph, ops=tuple(graph.ops[i] for i in again))
        return Reordered(ordered, tuple(self.order[i] for i in again), self.held)


def unchanged(graph: Graph) -> Reordered:
    """The graph as it is."""
    return Reordered(graph, tuple(range(len(graph.ops))))


def reordered(graph: Graph) -> Reordered:
    """The graph with its backward ops in a better order."""
    middle, last = _order(graph)
    held = {s for i in last for s in graph.ops[i].reads if 0 <= graph.producer[s] < graph.forward_count}
    return replace(unchanged(graph).then((*middle, *last)), held=frozenset(held))


def delayed(graph: Graph) -> Reordered:
    """The graph with each weight's gradient made only when one of the gradients it needs would be freed.

    The best order where nothing is kept: then activations cost no memory while nothing reads them.
    """
    backward = range(graph.forward_count, graph.plain_count)
    read = {s for i in backward for s in graph.ops[i].reads}
    stem = [i for i in backward if graph.ops[i].ordered or any(s in read for s in graph.ops[i].writes)]
    last_read = {s: i for i in stem for s in graph.ops[i].reads}
    behind: dict[int, list[int]] = {}
    for index in sorted(set(backward) - set(stem)):
        flowing = [s for s in graph.ops[index].reads if graph.storages[s].kind in ("tangent", "backward")]
        ready = max((graph.producer[s] for s in flowing), default=-1)
        freed = min((max(last_read.get(s, -1), graph.producer[s]) for s in flowing), default=-1)
        behind.setdefault(max(ready, freed), []).append(index)
    order = [*behind.get(-1, ())]
    for index in stem:
        order += [index, *behind.get(index, ())]
    return unchanged(graph).then(order)


def _order(graph: Graph) -> tuple[list[int], list[int]]:
    """Indices of the backward ops: those that others depend on as they stand, the rest behind what they wait for, and
    those to run last."""
    backward = range(graph.forward_count, graph.plain_count)
    read = {s for i in backward for s in graph.ops[i].reads}
    behind: dict[int, list[int]] = {}
    last: list[int] = []
    stem: list[int] = []
    for index in backward:
        op = graph.ops[index]
        if op.ordered or any(s in read for s in op.writes):
            stem.append(index)
        elif _grows(graph, index):
            last.append(index)
        else:
            after = max((graph.producer[s] for s in op.reads if graph.producer[s] >= graph.forward_count), default=-1)
            behind.setdefault(after, []).append(index)
    order = sorted(behind.get(-1, ()), key=lambda i: _growth_bytes(graph, i))
    for index in stem:
        order += [index, *sorted(behind.get(index, ()), key=lambda i: _growth_bytes(graph, i))]
    return order, sorted(last, key=lambda i: _growth_bytes(graph, i))


def _grows(graph: Graph, index: int) -> bool:
    return not graph.gradients_allocated and _growth_bytes(graph, index) > 0


def _growth_bytes(graph: Graph, index: int) -> int:
    """Bytes that stay when the op has run, less those it needs until then, parameters and inputs aside [B]."""
    op = graph.ops[index]
    needed_bytes = graph.bytes_of(s for s in op.reads if graph.storages[s].kind not in RESIDENT)
    return graph.bytes_of(op.writes) - needed_bytes
