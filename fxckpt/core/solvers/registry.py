"""What solvers there are, and what each can do besides: the one place to add one to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Timeline
from fxckpt.core.solvers.auto import auto
from fxckpt.core.solvers.baselines.collection import collection
from fxckpt.core.solvers.baselines.save_all import save_all
from fxckpt.core.solvers.baselines.selective import selective
from fxckpt.core.solvers.baselines.sqrt import sqrt
from fxckpt.core.solvers.baselines.treeverse import treeverse
from fxckpt.core.solvers.baselines.uniform import uniform
from fxckpt.core.solvers.chain.dp import dp, frontier
from fxckpt.core.solvers.exact.exhaustive import exhaustive
from fxckpt.core.solvers.exact.milp import milp
from fxckpt.core.solvers.min_memory import min_memory

Solver = Callable[[Graph, int], Schedule]
"""From a graph and a bound on the peak [B] to a schedule; options are keyword-only arguments with defaults."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """A way to all schedules worth having at once, from the lowest peak to the plain step, each faster than the last.

    Attributes:
        solver: name of the solver whose schedules these are.
        function: from a graph to the simulated schedules; it takes an `effort`.
    """

    solver: str
    function: Callable[..., list[Timeline]]


@dataclass(frozen=True, slots=True)
class Method:
    """A solver, and what it can do.

    Attributes:
        function: the solver.
        frontier: how it gives its schedules for all budgets at once; None if it has to be asked budget by budget.
        searches: whether it searches for low peaks and takes an `effort`: how long to.
        exact: whether it finds the optimum, and so is for small graphs only.
    """

    function: Callable[..., Schedule]
    frontier: Frontier | None = None
    searches: bool = False
    exact: bool = False


_TABLES = Frontier("dp", frontier)

SOLVERS: dict[str, Method] = {
    "auto": Method(auto, frontier=_TABLES, searches=True),
    "dp": Method(dp, frontier=_TABLES, searches=True),
    "save_all": Method(save_all),
    "uniform": Method(uniform),
    "sqrt": Method(sqrt),
    "selective": Method(selective),
    "collection": Method(collection),
    "min_memory": Method(min_memory, searches=True),
    "treeverse": Method(treeverse),
    "milp": Method(milp, exact=True),
    "exhaustive": Method(exhaustive, exact=True),
}
