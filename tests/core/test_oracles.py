"""The oracles against independent definitions, and everything else against the oracles."""

from __future__ import annotations

from itertools import product
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.errors import SolverError
from fxckpt.graph import Graph
from fxckpt.schedule import Schedule, check, plain
from fxckpt.simulate import simulate
from fxckpt.solvers.exhaustive import exhaustive
from fxckpt.solvers.milp import milp
from fxckpt.solvers.polish import polish
from tests.strategies import chain, graphs

EXTRA = 2  # repeats that the brute-force search tries


def by_brute_force(graph: Graph, budget_bytes: int) -> float | None:
    """Time of the fastest schedule within the budget, by simulating every short sequence."""
    forward, count = tuple(range(graph.forward_count)), len(graph.ops) - graph.forward_count
    best: float | None = None
    for length in range(count, count + EXTRA + 1):
        for backward in product(range(len(graph.ops)), repeat=length):
            schedule = Schedule(forward + backward, graph.forward_count)
            time_us = sum(graph.ops[i].time_us for i in schedule.order)
            if len(set(schedule.order)) < len(graph.ops) or (best is not None and time_us >= best):
                continue
            if is_valid(graph, schedule) and simulate(graph, schedule).peak_bytes <= budget_bytes:
                best = time_us
    return best


def is_valid(graph: Graph, schedule: Schedule) -> bool:
    try:
        check(graph, schedule)
    except ValueError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(graphs(most_forward=2, most_backward=2), st.floats(0.2, 1))
def test_exhaustive_is_what_brute_force_finds(graph: Graph, ratio: float) -> None:
    plain_bytes = simulate(graph, plain(graph)).peak_bytes
    budget_bytes = int(graph.static_bytes + ratio * (plain_bytes - graph.static_bytes))
    timeline = simulate(graph, exhaustive(graph, budget_bytes))
    expected = by_brute_force(graph, budget_bytes)
    if timeline.peak_bytes > budget_bytes:
        assert expected is None
    elif len(timeline.schedule) <= len(graph.ops) + EXTRA:
        assert timeline.step_us == expected
    else:
        assert expected is None or timeline.step_us <= expected


@settings(max_examples=60, deadline=None)
@given(graphs(most_forward=4, most_backward=4), st.floats(0.2, 1))
def test_polish_stays_behind_exhaustive(graph: Graph, ratio: float) -> None:
    plain_bytes = simulate(graph, plain(graph)).peak_bytes
    budget_bytes = int(graph.static_bytes + ratio * (plain_bytes - graph.static_bytes))
    optimum = simulate(graph, exhaustive(graph, budget_bytes))
    polished = simulate(graph, polish(graph, plain(graph), budget_bytes))
    if polished.peak_bytes <= budget_bytes:
        assert optimum.peak_bytes <= budget_bytes
        assert optimum.step_us <= polished.step_us


@settings(max_examples=100, deadline=None)
@given(graphs(most_forward=4, most_backward=4), st.floats(0.2, 1))
def test_milp_is_never_better_than_exhaustive_and_always_fits(graph: Graph, ratio: float) -> None:
    plain_bytes = simulate(graph, plain(graph)).peak_bytes
    budget_bytes = int(graph.static_bytes + ratio * (plain_bytes - graph.static_bytes))
    optimum = simulate(graph, exhaustive(graph, budget_bytes, reorder=False))
    found = simulate(graph, milp(graph, budget_bytes))
    if found.peak_bytes <= budget_bytes:
        assert optimum.peak_bytes <= budget_bytes
        assert optimum.step_us <= found.step_us
    else:
        assert optimum.peak_bytes <= found.peak_bytes <= plain_bytes


@pytest.mark.parametrize("allocated", [False, True])
@pytest.mark.parametrize("sizes_bytes", [(10, 20, 40), (7, 7, 7, 7), (9, 1, 9, 1), (3, 14, 15, 9, 2)])
def test_milp_finds_the_optimum_of_chains(sizes_bytes: tuple[int, ...], allocated: bool) -> None:
    graph = chain(sizes_bytes).with_gradients(allocated)
    plain_bytes = simulate(graph, plain(graph)).peak_bytes
    lowest_bytes = simulate(graph, exhaustive(graph, 0)).peak_bytes
    assert lowest_bytes < plain_bytes
    for budget_bytes in range(lowest_bytes - 1, plain_bytes + 1, 7):
        optimum, found = (simulate(graph, solver(graph, budget_bytes)) for solver in (exhaustive, milp))
        assert found.step_us == optimum.step_us or budget_bytes < lowest_bytes
        assert found.peak_bytes <= max(budget_bytes, lowest_bytes)


def test_exhaustive_without_room_gives_the_lowest_peak() -> None:
    graph = chain((10, 20, 40))
    lowest = simulate(graph, exhaustive(graph, 0))
    assert lowest.peak_bytes < simulate(graph, plain(graph)).peak_bytes
    assert exhaustive(graph, lowest.peak_bytes) == lowest.schedule
    below = simulate(graph, exhaustive(graph, lowest.peak_bytes - 1))
    assert below.peak_bytes == lowest.peak_bytes


def test_exhaustive_refuses_large_graphs() -> None:
    with pytest.raises(SolverError, match="at most 14 ops"):
        exhaustive(chain(tuple(range(1, 12))), 100)
