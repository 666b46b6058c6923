"""A better order within each segment's backward, found by beam search.

Backward as frameworks make it runs op by op in the reverse order of forward, which often starts a second branch before
the first is done, or makes the next gradient while an activation waits for the gradient of a weight. Within a segment
there are few ops, so a beam search over their orders (by peak, then by the sum of live bytes) finds a good one quickly.
An activation that was saved counts from the start to its last reader, one that is recomputed from its first reader on;
which of the two is not known yet, so there is an order for either.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.solvers.segments import Segments

_WIDTH = 32
_MOST_OPS = 200

_State = tuple[int, int, int, int, tuple[int, ...]]
"""Peak, sum of live bytes and live bytes [B]; storages that are there, as bits; ops in the order in which they ran."""


@dataclass(frozen=True)
class _Task:
    """The ops of one interval, numbered from 0; storages by number as well.

    Attributes:
        needs: for each op the set of ops (as bits) that must run before.
        touches: for each op the storages that it reads or writes.
        users: for each storage the set of ops (as bits) that read or write it.
        sizes_bytes: bytes of each storage.
        stays: whether a storage stays when the interval has run.
        here: storages that are there from the start (as bits).
    """

    needs: tuple[int, ...]
    touches: tuple[tuple[int, ...], ...]
    users: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    stays: tuple[bool, ...]
    here: int


def eased(graph: Graph, segments: Segments, *, saved: bool) -> list[int]:
    """Indices of the backward ops in a better order.

    Args:
        graph: the training step.
        segments: a cutting of it; ops stay in their segments, and very long segments as they are.
        saved: whether activations count from the start.
    """
    last_read = {s: i for i, op in enumerate(graph.plain_ops) for s in op.reads}
    solved: dict[_Task, tuple[int, ...]] = {}
    order: list[int] = []
    for start, end in pairwise(reversed(segments.backward_cuts)):
        if end - start > _MOST_OPS:
            order += range(start, end)
            continue
        task = _task(graph, range(start, end), last_read, saved)
        if task not in solved:
            solved[task] = _search(task)
        order += (start + i for i in solved[task])
    return order


def _task(graph: Graph, interval: range, last_read: dict[int, int], saved: bool) -> _Task:
    ops = graph.ops[interval.start : interval.stop]
    numbers: dict[int, int] = {}
    touches = []
    for op in ops:
        mentioned = dict.fromkeys((*op.reads, *op.writes))
        used = [s for s in mentioned if graph.storages[s].kind not in RESIDENT]
        touches.append(tuple(numbers.setdefault(s, len(numbers)) for s in used))
    users = [0] * len(numbers)
    needs = [0] * len(ops)
    for index, op in enumerate(ops):
        for number in touches[index]:
            users[number] |= 1 << index
        for storage in op.reads:
            if graph.producer[storage] in interval:
                needs[index] |= 1 << graph.producer[storage] - interval.start
    ordered = [i for i, op in enumerate(ops) if op.ordered]
    for first, second in pairwise(ordered):
        needs[second] |= 1 << first
    staying = frozenset(() if graph.gradients_allocated else graph.gradients)
    lasting = {s for s in numbers if last_read.get(s, 0) >= interval.stop}
    there = {s for s in numbers if graph.producer[s] < interval.start}
    if not saved:
        there = {s for s in there if graph.storages[s].kind != "activation" or s in lasting}
    return _Task(
        needs=tuple(needs),
        touches=tuple(touches),
        users=tuple(users),
        sizes_bytes=tuple(graph.storages[s].size_bytes for s in numbers),
        stays=tuple(s in lasting or s in staying for s in numbers),
        here=sum(1 << number for s, number in numbers.items() if s in there),
    )


def _search(task: _Task) -> tuple[int, ...]:
    count = len(task.needs)
    live = sum(size for number, size in enumerate(task.sizes_bytes) if task.here >> number & 1)
    beam: dict[int, _State] = {0: (0, 0, live, task.here, ())}
    for _ in range(count):
        grown: dict[int, _State] = {}
        for done, (peak, area, live, here, order) in beam.items():
            for op in range(count):
                if done >> op & 1 or task.needs[op] & ~done:
                    continue
                state = _run(task, op, done, peak, area, live, here)
                key = done | 1 << op
                if key not in grown or state[:2] < grown[key][:2]:
                    grown[key] = (*state, (*order, op))
        best = sorted(grown.items(), key=lambda item: (item[1][:2], item[1][4]))
        beam = dict(best[:_WIDTH])
    return next(iter(beam.values()))[4]


def _run(task: _Task, op: int, done: int, peak: int, area: int, live: int, here: int) -> tuple[int, int, int, int]:
    """Peak, sum of live bytes, live bytes and storages there when one more op has run."""
    for number in task.touches[op]:
        if not here >> number & 1:
            here |= 1 << number
            live += task.sizes_bytes[number]
    peak, area = max(peak, live), area + live
    after = done | 1 << op
    for number in task.touches[op]:
        if not task.stays[number] and not task.users[number] & ~after:
            here &= ~(1 << number)
            live -= task.sizes_bytes[number]
    return peak, area, live, here
