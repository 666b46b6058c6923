"""Sublinear memory: boundaries kept so that every segment between them holds about as many bytes.

Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv:1604.06174, algorithm 3, on
the points where one storage crosses. The size b of a segment is searched as they suggest: between √(xy)/√2 and
√(xy)·√2, where x is what the boundaries hold and y what the segments hold for b = √(all bytes).
"""

from __future__ import annotations

import math
from itertools import pairwise

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.keep import cheapest_fitting, schedule_keeping
from fxckpt.core.solvers.segments import Segments, cut

_LONGEST_OPS = 32
_TRIES = 12


def sqrt(graph: Graph, budget_bytes: int) -> Schedule:
    """Of the segment sizes searched the fastest that fits, or the one of lowest peak if none does."""
    segments = cut(graph, longest_ops=_LONGEST_OPS)
    inside = [_bytes_written(graph, segments, i) for i in range(len(segments))]
    middle = math.sqrt(_product(graph, segments, inside, math.sqrt(sum(inside) * max(inside, default=0))))
    sizes = [middle / math.sqrt(2) * 2 ** (i / (_TRIES - 1)) for i in range(_TRIES)]
    kept = {tuple(_greedy(segments, inside, size)) for size in sizes}
    return cheapest_fitting(graph, (_keeping(graph, segments, chosen) for chosen in sorted(kept)), budget_bytes)


def _greedy(segments: Segments, inside: list[int], size_bytes: float) -> list[int]:
    """Indices of the boundaries to keep: one whenever `size_bytes` have been written since the last."""
    chosen, since = [], 0
    for index in range(len(segments)):
        if since > size_bytes:
            chosen.append(index)
            since = 0
        since += inside[index]
    return chosen


def _product(graph: Graph, segments: Segments, inside: list[int], size_bytes: float) -> float:
    """Bytes of the boundaries kept times those of the largest segment between them, at least 1 [B²]."""
    chosen = _greedy(segments, inside, size_bytes)
    kept_bytes = graph.bytes_of(s for i in chosen for s in segments.boundaries[i])
    ends = [0, *chosen, len(inside)]
    largest_bytes = max(sum(inside[a:b]) for a, b in pairwise(ends))
    return float(max(kept_bytes, 1) * max(largest_bytes, 1))


def _bytes_written(graph: Graph, segments: Segments, index: int) -> int:
    ops = graph.ops[segments.forward_cuts[index] : segments.forward_cuts[index + 1]]
    return graph.bytes_of(s for op in ops for s in op.writes)


def _keeping(graph: Graph, segments: Segments, chosen: tuple[int, ...]) -> Schedule:
    return schedule_keeping(graph, {*segments.pinned, *(s for i in chosen for s in segments.boundaries[i])})
