"""The oracles against independent definitions, and everything else against the oracles."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.errors import SolverError
from fxckpt.graph import Graph, Op, Storage, StorageKind
from fxckpt.schedule import Schedule, check, plain
from fxckpt.simulate import simulate
from fxckpt.solvers.exhaustive import exhaustive
from fxckpt.solvers.milp import milp
from fxckpt.solvers.polish import polish
from fxckpt.solvers.treeverse import forward_steps, treeverse
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
@pytest.mark.parametrize("sizes_bytes", [(10, 20, 40), (7, 7, 7, 7), (9, 1, 9, 1), (3, 14, 15, 9)])
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


def equal_chain(layers: int) -> Graph:
    """Equal layers of two forward ops. Backward of a layer reads its input and the two storages inside it."""
    storages = [Storage("x", 1, "input")]
    ops: list[Op] = []

    def op(name: str, reads: tuple[int, ...], sizes_bytes: tuple[int, ...], kind: StorageKind) -> tuple[int, ...]:
        first = len(storages)
        storages.extend(Storage(f"{name}.{i}", size, kind) for i, size in enumerate(sizes_bytes))
        writes = tuple(range(first, len(storages)))
        ops.append(Op(name, "layer", reads, writes, time_us=1.0))
        return writes

    boundary: tuple[int, ...] = (0,)
    read_back = []
    for i in range(layers):
        inside = op(f"in{i}", boundary, (5, 5), "activation")
        read_back.append(boundary + inside)
        boundary = op(f"out{i}", inside, (1,), "activation")
    storages.append(Storage("tangent", 1, "tangent"))
    gradient: tuple[int, ...] = (len(storages) - 1,)
    for i in reversed(range(layers)):
        gradient = op(f"back{i}", gradient + read_back[i], (1,), "backward")
    return Graph(tuple(ops), tuple(storages), 2 * layers, outputs=boundary, gradients=gradient)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5])
@pytest.mark.parametrize("layers", [2, 3, 7, 10, 20])
def test_treeverse_repeats_as_often_as_the_closed_form_says(layers: int, checkpoints: int) -> None:
    graph = equal_chain(layers)
    repeats = treeverse(graph, 0, checkpoints=checkpoints).repeats()
    into_segment = [repeats.get(2 * i, 0) for i in range(layers)]
    assert sum(into_segment) == forward_steps(layers, checkpoints)


def test_treeverse_in_full() -> None:
    graph = equal_chain(4)
    order = treeverse(graph, 0, checkpoints=2).order
    names = " ".join(graph.ops[i].name for i in order[8:])
    assert names == "back3 in1 out1 in2 back2 in1 back1 in0 back0"


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", range(1, 12))
def test_the_closed_form_is_the_best_division(steps: int, checkpoints: int) -> None:
    assert forward_steps(steps, checkpoints) == least_forward_steps(steps, checkpoints)


@cache
def least_forward_steps(steps: int, checkpoints: int) -> int:
    """By definition: run to the next checkpoint, run back what is behind it, then what is before it."""
    if steps == 1:
        return 0
    if checkpoints == 1:
        return steps * (steps - 1) // 2
    return min(
        middle + least_forward_steps(steps - middle, checkpoints - 1) + least_forward_steps(middle, checkpoints)
        for middle in range(1, steps)
    )
