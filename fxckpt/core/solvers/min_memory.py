"""The floor: the smallest peak that can be found, at whatever cost in time."""

from __future__ import annotations

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.chain.dp import Effort, dp


def min_memory(graph: Graph, budget_bytes: int, *, effort: Effort = "default") -> Schedule:  # noqa: ARG001
    """The schedule of lowest peak; of several such the fastest."""
    return dp(graph, 0, effort=effort)
