"""The gate: runs a solver, simulates what it returns, and vouches for the result.

That is a valid schedule whose peak is within the budget. A solver that can't fit the budget returns the schedule of
lowest peak that it can find, from which `solve` says what the floor is and what makes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.core.solvers.chain.dp import LEVELS
from fxckpt.core.solvers.registry import SOLVERS, Method, Solver
from fxckpt.errors import InfeasibleBudgetError, InvalidScheduleError, SolverError
from fxckpt.units import format_bytes


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        schedule: valid, and within the budget.
        solver: name of the solver.
        timeline: the simulated schedule.
    """

    schedule: Schedule
    solver: str
    timeline: Timeline

    def __repr__(self) -> str:
        return (
            f"Solution(solver={self.solver!r}, peak_bytes={self.timeline.peak_bytes}, "
            f"recompute_us={self.timeline.recompute_us:.1f}, steps={len(self.schedule)})"
        )


def solve(graph: Graph, budget_bytes: int, solver: str | Solver = "auto", **options: Any) -> Solution:
    """Find a schedule whose peak is within a budget.

    Args:
        graph: the training step.
        budget_bytes: bound on the whole peak, what is there before the step included [B].
        solver: a name from `SOLVERS`, or a function from graph and budget to a schedule.
        **options: passed on to the solver.

    Raises:
        SolverError: no solver has this name, it has no such option, or what it returned is not a valid schedule.
        InfeasibleBudgetError: the best that the solver found is over the budget.
    """
    found = _run(graph, budget_bytes, solver, options)
    peak_bytes = found.timeline.peak_bytes
    if peak_bytes > budget_bytes:
        message = _infeasible(solver, found.timeline, budget_bytes)
        raise InfeasibleBudgetError(message, budget_bytes=budget_bytes, floor_bytes=peak_bytes)
    return found


def lowest(graph: Graph, solver: str | Solver = "auto", **options: Any) -> Solution:
    """The schedule of lowest peak that a solver finds: its floor.

    Raises:
        SolverError: as `solve`.
    """
    return _run(graph, 0, solver, options)


def _run(graph: Graph, budget_bytes: int, solver: str | Solver, options: dict[str, Any]) -> Solution:
    check_options(solver, options)
    name, method = look_up(solver)
    schedule = method.function(graph, budget_bytes, **options)
    try:
        return Solution(schedule, name, simulate(graph, schedule))
    except (InvalidScheduleError, AttributeError, TypeError) as error:
        raise SolverError(f"solver {name} returned what is not a valid schedule: {error}") from error


def check_options(solver: str | Solver, options: Mapping[str, Any]) -> None:
    """See that a solver exists and takes these options, before there is a graph.

    Raises:
        SolverError: no solver has this name, it has no such option or needs one, or there is no such effort.
    """
    name, method = look_up(solver)
    signature = inspect.signature(method.function)
    if "effort" in options and isinstance(solver, str) and not method.searches:
        searching = ", ".join(n for n, other in SOLVERS.items() if other.searches)
        raise SolverError(f"solver {name} has no effort to choose: it does not search. Those that do: {searching}")
    try:
        signature.bind(None, 0, **options)
    except TypeError as error:
        raise SolverError(f"solver {name} can't be called with options {sorted(options)}: {error}") from error
    if method.searches and "effort" in options:
        default = signature.parameters["effort"].default
        if options["effort"] not in (default, *LEVELS):
            raise SolverError(f"there is no effort {options['effort']!r}; choose one of {', '.join(LEVELS)}")


def look_up(solver: str | Solver) -> tuple[str, Method]:
    """The name of a solver, and what it can do; a function of one's own is a solver too.

    Raises:
        SolverError: no solver has this name.
    """
    if not isinstance(solver, str):
        return getattr(solver, "__name__", type(solver).__name__), Method(solver)
    if solver not in SOLVERS:
        raise SolverError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    return solver, SOLVERS[solver]


def _infeasible(solver: str | Solver, timeline: Timeline, budget_bytes: int) -> str:
    """What the smallest peak consists of, where it stands, and what would lower it."""
    name, method = look_up(solver)
    graph = timeline.graph
    parts = {kind: size for kind, size in timeline.at_peak.items() if size}
    sizes = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in sorted(parts.items(), key=lambda x: -x[1]))
    lines = [
        f"the smallest peak that solver {name} reaches is {format_bytes(timeline.peak_bytes)} "
        f"({timeline.peak_bytes} bytes), over the budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes).",
        f"At that peak: {sizes}.",
    ]
    if timeline.peak_step >= 0:
        op = graph.ops[timeline.schedule.order[timeline.peak_step]]
        phase = "forward" if timeline.peak_step < timeline.schedule.forward_steps else "backward"
        place = "".join((f" of module {op.module}" if op.module else "", f" at {op.source}" if op.source else ""))
        lines.append(f"It stands at {op.name} ({op.target}) in {phase}{place}.")
    lines.append(_remedy(method, timeline, budget_bytes))
    return " ".join(lines)


def _remedy(method: Method, timeline: Timeline, budget_bytes: int) -> str:
    if timeline.graph.static_bytes > budget_bytes:
        static = format_bytes(timeline.graph.static_bytes)
        return (
            f"Parameters, buffers, inputs and the like alone take {static}, which no recomputation lowers: raise the "
            "budget, or use a smaller model or parameters of a smaller type."
        )
    raised = f"Raise the budget to {timeline.peak_bytes} bytes, or use a smaller batch."
    return raised if method.searches else f"{raised} Solver dp may reach a smaller peak."
