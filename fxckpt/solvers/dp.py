"""Dynamic programming over segments (first version: the best of the single-level baselines)."""

from __future__ import annotations

from typing import Literal

from fxckpt.graph import Graph
from fxckpt.schedule import Schedule, plain
from fxckpt.solvers.keep import cheapest_fitting
from fxckpt.solvers.selective import selective
from fxckpt.solvers.sqrt import sqrt
from fxckpt.solvers.uniform import uniform

Effort = Literal["fast", "default", "max"]


def dp(graph: Graph, budget_bytes: int, *, effort: Effort = "default") -> Schedule:  # noqa: ARG001
    """The fastest schedule found that fits, or the one of lowest peak if none does."""
    found = [solver(graph, budget_bytes) for solver in (selective, uniform, sqrt)]
    return cheapest_fitting(graph, [plain(graph), *found], budget_bytes)


def frontier(graph: Graph, *, effort: Effort = "default") -> list[Schedule]:  # noqa: ARG001
    """Schedules from the lowest peak to the plain step, each faster than the one before."""
    return [dp(graph, 0), plain(graph)]
