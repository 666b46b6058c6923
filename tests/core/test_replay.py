"""What schedules take in blocks, and budgets for that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.core.caching_allocator import AllocatorSettings
from fxckpt.core.fitting import solve_in_blocks
from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.replay import Occupancy, replay
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.core.solvers import lowest
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.units import CUDA_BLOCK_BYTES
from tests.support.strategies import graphs_with_schedules

MIB = 2**20
DEFAULT, EXPANDABLE = AllocatorSettings(), AllocatorSettings(expandable_segments=True)


def scaled(graph: Graph, unit_bytes: int) -> Graph:
    """The graph with sizes in units of so many bytes."""
    return replace(
        graph,
        storages=tuple(replace(s, size_bytes=s.size_bytes * unit_bytes) for s in graph.storages),
        ops=tuple(replace(op, workspace_bytes=op.workspace_bytes * unit_bytes) for op in graph.ops),
        allocated_gradient_bytes=graph.allocated_gradient_bytes * unit_bytes,
        reserved_bytes=graph.reserved_bytes * unit_bytes,
    )


@given(graphs_with_schedules())
def test_where_blocks_are_split_to_the_end_the_peak_is_the_simulated_one(case: tuple[Graph, Schedule]) -> None:
    graph, schedule = case
    timeline = simulate(scaled(graph, CUDA_BLOCK_BYTES), schedule)
    if len(schedule):
        assert replay(timeline, EXPANDABLE).allocated_bytes == timeline.peak_bytes


@given(
    graphs_with_schedules(),
    st.sampled_from([700, MIB // 3, MIB, 3 * MIB + 100]),
    st.sampled_from([DEFAULT, EXPANDABLE]),
)
def test_blocks_are_no_smaller_than_what_is_in_them(
    case: tuple[Graph, Schedule], unit_bytes: int, allocator: AllocatorSettings
) -> None:
    graph, schedule = case
    timeline = simulate(scaled(graph, unit_bytes), schedule)
    found = replay(timeline, allocator)
    if len(schedule):
        assert timeline.peak_bytes <= found.allocated_bytes <= found.reserved_bytes


def chain(count: int, size_bytes: int) -> Graph:
    """Ops that each read the result of the one before; backward reads all of them."""
    storages = [Storage("x", size_bytes, "input")]
    storages += [Storage(f"y{i}", size_bytes, "activation") for i in range(count)]
    ops = [Op(f"f{i}", "f", (i,), (i + 1,), time_us=1.0) for i in range(count)]
    storages.append(Storage("tangent", size_bytes, "tangent"))
    for i in reversed(range(count)):
        storages.append(Storage(f"g{i}", size_bytes, "backward"))
        ops.append(Op(f"b{i}", "b", (i, len(storages) - 2), (len(storages) - 1,), time_us=1.0))
    graph = Graph(tuple(ops), tuple(storages), count, gradients=(len(storages) - 1,), outputs=(count,))
    graph.check()
    return graph


def test_blocks_that_are_not_split_count_whole() -> None:
    graph = chain(6, 11 * MIB)  # in segments of 12 MiB, of which no more than 1 MiB would remain
    timeline = simulate(graph, plain(graph))
    assert replay(timeline, DEFAULT).allocated_bytes == timeline.peak_bytes // 11 * 12
    assert replay(timeline, EXPANDABLE).allocated_bytes == timeline.peak_bytes


def test_what_libraries_keep_and_what_is_reserved_count() -> None:
    graph = chain(3, 4 * MIB)
    more = replace(graph, library_bytes=32 * MIB, reserved_bytes=100)
    before, after = (replay(simulate(g, plain(g)), DEFAULT) for g in (graph, more))
    assert after.allocated_bytes - before.allocated_bytes == 32 * MIB + 100
    assert simulate(more, plain(more)).at_peak["libraries"] == 32 * MIB


def test_a_result_written_over_an_input_takes_no_block_of_its_own() -> None:
    size_bytes = 3 * MIB
    storages = [Storage("x", 0, "input"), *(Storage(f"y{i}", size_bytes, "activation") for i in range(3))]
    ops = tuple(Op(f"f{i}", "f", (i,), (i + 1,)) for i in range(3))
    graph = Graph(ops, tuple(storages), 3, outputs=(3,))
    timeline = simulate(graph, plain(graph))
    assert replay(timeline, EXPANDABLE).allocated_bytes == 2 * size_bytes
    assert replay(timeline, EXPANDABLE, {1: 1, 2: 2}).allocated_bytes == size_bytes


def _in_blocks(timeline: Timeline) -> Occupancy:
    return replay(timeline, DEFAULT)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.8, 0.7])
@pytest.mark.parametrize("size_bytes", [11 * MIB, 3 * MIB + 100, 700])
def test_a_budget_for_blocks_holds_for_blocks(size_bytes: int, share: float) -> None:
    graph = chain(8, size_bytes)
    nothing = simulate(graph, plain(graph))
    budget_bytes = int(_in_blocks(nothing).allocated_bytes * share)
    solution, taken = solve_in_blocks(graph, budget_bytes, "auto", _in_blocks, effort="fast")
    assert taken == _in_blocks(solution.timeline)
    assert taken.allocated_bytes <= budget_bytes
    if share == 1.0:
        assert not solution.schedule.repeats()


def test_a_first_guess_that_leaves_too_much_room_is_dropped() -> None:
    graph = chain(6, 3 * MIB)
    floor = lowest(graph, "auto", effort="fast").timeline
    budget_bytes = _in_blocks(floor).allocated_bytes
    _, taken = solve_in_blocks(graph, budget_bytes, "auto", _in_blocks, expected_bytes=2 * MIB, effort="fast")
    assert taken.allocated_bytes <= budget_bytes


def test_where_only_sizes_fit_it_says_so() -> None:
    graph = chain(6, 11 * MIB)
    floor_bytes = lowest(graph, "auto", effort="fast").timeline.peak_bytes
    with pytest.raises(InfeasibleBudgetError, match="in blocks of the CUDA caching allocator") as e:
        solve_in_blocks(graph, floor_bytes, "auto", _in_blocks, effort="fast")
    assert e.value.floor_bytes == _in_blocks(lowest(graph, "auto", effort="fast").timeline).allocated_bytes


@settings(max_examples=30)
@given(st.integers(2, 7), st.sampled_from([11 * MIB, 5 * MIB + 1, 2**19]), st.floats(0.5, 1.0))
def test_any_budget_holds_or_is_refused(count: int, size_bytes: int, share: float) -> None:
    graph = chain(count, size_bytes)
    budget_bytes = int(_in_blocks(simulate(graph, plain(graph))).allocated_bytes * share)
    options: dict[str, Any] = {"effort": "fast"}
    try:
        _, taken = solve_in_blocks(graph, budget_bytes, "auto", _in_blocks, expected_bytes=MIB, **options)
    except InfeasibleBudgetError as error:
        assert error.floor_bytes > budget_bytes  # noqa: PT017
    else:
        assert taken.allocated_bytes <= budget_bytes
