"""Checkpoints at even distances: keep the boundary of every k-th segment, recompute what lies between.

What `torch.utils.checkpoint` does when a user wraps groups of k layers.
"""

from __future__ import annotations

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.keep import cheapest_fitting, schedule_keeping
from fxckpt.core.solvers.segments import Segments, cut
from fxckpt.errors import SolverError

_LONGEST_OPS = 32


def uniform(graph: Graph, budget_bytes: int, *, k: int | None = None) -> Schedule:
    """Keep every k-th boundary; of all k the fastest that fits if `k` is None, or the one of lowest peak if none does.

    Raises:
        SolverError: k is less than 1.
    """
    if k is not None and k < 1:
        raise SolverError(f"uniform keeps every k-th boundary, so k must be at least 1, not {k}")
    segments = cut(graph, longest_ops=_LONGEST_OPS)
    steps = [k] if k is not None else sorted({max(1, len(segments) // n) for n in range(1, min(len(segments), 64) + 1)})
    return cheapest_fitting(graph, (_every(graph, segments, step) for step in steps), budget_bytes)


def _every(graph: Graph, segments: Segments, step: int) -> Schedule:
    return schedule_keeping(graph, {*segments.pinned, *(s for b in segments.boundaries[::step] for s in b)})
