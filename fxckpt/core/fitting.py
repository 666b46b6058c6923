"""A budget for blocks: a schedule is solved for by sizes, but what it takes in blocks is to be within the budget."""

from __future__ import annotations

from collections.abc import Callable

from fxckpt.core.graph import Graph
from fxckpt.core.replay import Occupancy
from fxckpt.core.simulate import Timeline
from fxckpt.core.solvers import Solution, Solver, lowest, solve
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.units import format_bytes

_ROUNDS = 4


def solve_in_blocks(
    graph: Graph,
    budget_bytes: int,
    solver: str | Solver,
    occupancy: Callable[[Timeline], Occupancy],
    *,
    expected_bytes: int = 0,
    **options: object,
) -> tuple[Solution, Occupancy]:
    """Find a schedule whose peak in blocks is within a budget, by solving for a budget that leaves room for them.

    What blocks take beyond sizes is known only once there is a schedule, and is about the same for the next one.

    Args:
        graph, budget_bytes, solver: as for `solve`.
        occupancy: what a schedule takes in blocks.
        expected_bytes: what blocks may take beyond sizes: the room that is left at first [B].
        **options: passed on to the solver.

    Raises:
        SolverError: as `solve`.
        InfeasibleBudgetError: no schedule was found whose peak is within the budget.
    """
    room_bytes = max(expected_bytes, 0)
    refused = ""
    for number in range(_ROUNDS):
        try:
            found = solve(graph, budget_bytes - room_bytes, solver, **options)
        except InfeasibleBudgetError as error:
            if number or not room_bytes:
                refused = "" if room_bytes else str(error)
                break
            room_bytes = 0
            continue
        taken = occupancy(found.timeline)
        if taken.allocated_bytes <= budget_bytes:
            return found, taken
        room_bytes = max(room_bytes + 1, taken.allocated_bytes - found.timeline.peak_bytes)
    found = lowest(graph, solver, **options)
    taken = occupancy(found.timeline)
    if taken.allocated_bytes <= budget_bytes:
        return found, taken
    raise InfeasibleBudgetError(
        refused or _over(found, taken, budget_bytes), budget_bytes=budget_bytes, floor_bytes=taken.allocated_bytes
    )


def _over(lowest_found: Solution, taken: Occupancy, budget_bytes: int) -> str:
    """That the least peak fits by sizes, but not in blocks."""
    peak, floor_bytes = format_bytes(lowest_found.timeline.peak_bytes), taken.allocated_bytes
    return (
        f"the smallest peak that solver {lowest_found.solver} reaches is {peak}, but in blocks of the CUDA caching "
        f"allocator that is {format_bytes(floor_bytes)} ({floor_bytes} bytes), over the budget of "
        f"{format_bytes(budget_bytes)} ({budget_bytes} bytes). With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "
        f"blocks are as large as what is in them; or raise the budget to {floor_bytes} bytes, or use a smaller batch."
    )
