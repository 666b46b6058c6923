"""The solver used when none is named: nothing if nothing is needed, else the best of what there is."""

from __future__ import annotations

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers.baselines.selective import selective
from fxckpt.core.solvers.baselines.sqrt import sqrt
from fxckpt.core.solvers.baselines.uniform import uniform
from fxckpt.core.solvers.chain.dp import Effort, dp, usual_effort
from fxckpt.core.solvers.keep import cheapest_fitting


def auto(graph: Graph, budget_bytes: int, *, effort: Effort | None = None) -> Schedule:
    """The plain step if it fits, else the fastest that fits of `dp` and the baselines.

    Args:
        graph: the training step.
        budget_bytes: bound on the peak [B].
        effort: how long `dp` may search; None for "default", or "fast" on graphs of thousands of ops.
    """
    if simulate(graph, plain(graph)).peak_bytes <= budget_bytes:
        return plain(graph)
    baselines = (solver(graph, budget_bytes) for solver in (selective, uniform, sqrt))
    found = dp(graph, budget_bytes, effort=effort or usual_effort(graph))
    return cheapest_fitting(graph, (found, *baselines), budget_bytes)
