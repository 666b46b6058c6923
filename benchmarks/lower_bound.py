"""A proved lower bound on the time that any schedule repeats within a budget.

Look at one moment of the step, the first run of op t. What is live fits the budget; whatever of the rest a later op
reads must be made again after that moment, from what is live, with every op that this takes. So the step repeats at
least as much as the cheapest choice of live storages that fits. Relaxed to prices a byte, this choice is a minimum cut
(`fxckpt.core.solvers.mincut`), and the lower hull of all cuts bounds it from below (Lagrange duality).

At the moment when backward starts the bound holds for every schedule. At a later one it holds for schedules in which
backward ops run for the first time in the graph's order. It counts each op once, so where ops must be repeated several
times the truth lies above it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.schedule import deliveries, plain
from fxckpt.core.solvers.mincut import KeepProblem

Hull = list[tuple[int, float]]
"""Corners (bytes in use [B], time repeated [µs]) of a lower hull, from few bytes to many."""


class LowerBound:
    """Lower bounds of one graph for all budgets.

    Args:
        graph: the training step.
        keep_order: whether only schedules count that keep backward's order; if so the bound is higher.
    """

    def __init__(self, graph: Graph, *, keep_order: bool) -> None:
        moments = range(graph.forward_count, graph.plain_count) if keep_order else [graph.forward_count]
        self._hulls = [_hull(graph, op, at_start=not keep_order) for op in moments]

    def recompute_us(self, budget_bytes: int) -> float | None:
        """At least so much time is repeated [µs]; None if nothing fits the budget."""
        bounds = [_height(hull, budget_bytes) for hull in self._hulls]
        return None if None in bounds else max((b for b in bounds if b is not None), default=0.0)

    def floor_bytes(self) -> int:
        """No peak is lower [B]."""
        return max(hull[0][0] for hull in self._hulls)


def _hull(graph: Graph, moment: int, *, at_start: bool) -> Hull:
    """The hull at the first run of an op of backward; `at_start`: of any op that backward may start with."""
    op, read_later = graph.ops[moment], {s for o in graph.plain_ops[moment + 1 - at_start :] for s in o.reads}
    in_use = set() if at_start else {*op.reads, *op.writes}
    there = in_use | _held(graph, moment) | {s for s in read_later if graph.storages[s].kind == "tangent"}
    there -= {s for s, info in enumerate(graph.storages) if info.kind in RESIDENT}
    base_bytes = graph.static_bytes + graph.bytes_of(there)
    base_bytes += 0 if at_start else op.workspace_bytes
    problem = KeepProblem(replace(graph, forward_count=moment + 1 - at_start), there)
    return [(base_bytes + kept_bytes, time_us) for kept_bytes, time_us in map(problem.cost, problem.hull(10**6))]


def _held(graph: Graph, moment: int) -> set[int]:
    """Outputs, and gradients that are finished when an op runs and have not left.

    A tangent that is handed on as a gradient may leave before anything runs.
    """
    finished = {s for s in graph.gradients if 0 <= graph.producer[s] < moment}
    if graph.gradients_allocated:
        finished -= {s for stage in deliveries(graph, plain(graph)) if stage.step < moment for s in stage.gradients}
    return finished.union(graph.outputs)


def _height(hull: Hull, budget_bytes: int) -> float | None:
    """Time at a budget on the hull; None left of it."""
    if budget_bytes < hull[0][0]:
        return None
    if len(hull) == 1 or budget_bytes >= hull[-1][0]:
        return min(time_us for _, time_us in hull)
    right = bisect_right(hull, (budget_bytes, float("inf")))
    (low_bytes, low_us), (high_bytes, high_us) = hull[right - 1], hull[right]
    return low_us + (high_us - low_us) * (budget_bytes - low_bytes) / max(high_bytes - low_bytes, 1)
