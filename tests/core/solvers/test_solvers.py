"""Every solver: what it returns is valid and within the budget, a larger budget is never slower, errors say enough."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import SOLVERS, Method, solve
from fxckpt.core.solvers.chain.blocks import Blocks
from fxckpt.core.solvers.chain.dp import dp, frontier
from fxckpt.core.solvers.exact.exhaustive import exhaustive
from fxckpt.core.solvers.keep import schedule_keeping
from fxckpt.core.solvers.mincut import KeepProblem
from fxckpt.core.solvers.segments import Where, cut
from fxckpt.errors import InfeasibleBudgetError, SolverError
from tests.support.strategies import chain, graphs, training_steps

UNNAMED = sorted(
    name for name, method in SOLVERS.items() if not method.exact and name != "collection"
)  # need no options
SEARCHING = ("auto", "dp", "uniform", "sqrt", "treeverse")  # use the budget to choose

steps = st.one_of(graphs(), training_steps())


def budgets(graph: Graph, count: int = 8) -> list[int]:
    """Budgets from what is always there to the plain peak."""
    peak_bytes = simulate(graph, plain(graph)).peak_bytes
    low = min(graph.static_bytes, peak_bytes)
    return sorted({low + (peak_bytes - low) * i // count for i in range(count + 1)})


def feasible(graph: Graph, budget_bytes: int, solver: str) -> float | None:
    """Time of what the solver finds, None if that is over budget."""
    try:
        return solve(graph, budget_bytes, solver).timeline.step_us
    except InfeasibleBudgetError:
        return None


@pytest.mark.parametrize("method", SOLVERS.values(), ids=list(SOLVERS))
def test_what_is_said_of_a_solver_is_true(method: Method) -> None:
    options = inspect.signature(method.function).parameters
    assert ("effort" in options) == method.searches
    if method.frontier is not None:
        assert "effort" in inspect.signature(method.frontier.function).parameters
        assert SOLVERS[method.frontier.solver].frontier is method.frontier
    if method.exact:
        graph = chain((10, 20, 40))
        budget_bytes = simulate(graph, plain(graph)).peak_bytes - 17
        best = simulate(graph, exhaustive(graph, budget_bytes, reorder=False))
        assert simulate(graph, method.function(graph, budget_bytes)).step_us == best.step_us > graph.step_us


@pytest.mark.parametrize("solver", UNNAMED)
@settings(max_examples=20)
@given(graph=steps, ratio=st.floats(0, 1))
def test_what_a_solver_returns_is_valid_and_keeps_its_word(solver: str, graph: Graph, ratio: float) -> None:
    budget_bytes = int(ratio * simulate(graph, plain(graph)).peak_bytes)
    schedule = SOLVERS[solver].function(graph, budget_bytes)
    floor_bytes = simulate(graph, schedule).peak_bytes
    assert schedule.order[: schedule.forward_steps] == tuple(range(graph.forward_count))
    if floor_bytes <= budget_bytes:
        assert solve(graph, budget_bytes, solver).schedule == schedule
        return
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(graph, budget_bytes, solver)
    assert (caught.value.budget_bytes, caught.value.floor_bytes) == (budget_bytes, floor_bytes)
    assert solve(graph, floor_bytes, solver).timeline.peak_bytes <= floor_bytes


@pytest.mark.parametrize("solver", SEARCHING)
@settings(max_examples=10)
@given(graph=training_steps())
def test_a_larger_budget_is_never_slower(solver: str, graph: Graph) -> None:
    times = [feasible(graph, budget_bytes, solver) for budget_bytes in budgets(graph)]
    for tight, loose in pairwise(times):
        assert tight is None or (loose is not None and loose <= tight + 1e-9)


@settings(max_examples=60)
@given(training_steps(most_layers=4), st.floats(0.3, 1))
def test_dp_is_never_better_than_the_optimum_nor_needs_more_than_it_can(graph: Graph, ratio: float) -> None:
    peak_bytes = simulate(graph, plain(graph)).peak_bytes
    budget_bytes = int(graph.static_bytes + ratio * (peak_bytes - graph.static_bytes))
    found = simulate(graph, dp(graph, budget_bytes, effort="fast"))
    if len(graph.ops) > 12 or found.peak_bytes > budget_bytes:
        return
    best = simulate(graph, exhaustive(graph, budget_bytes))
    assert best.peak_bytes <= budget_bytes
    assert best.step_us <= found.step_us + 1e-9


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_dp_is_optimal_on_a_chain(ratio: float) -> None:
    graph = chain((10, 20, 40))
    budget_bytes = int(ratio * simulate(graph, plain(graph)).peak_bytes)
    best = simulate(graph, exhaustive(graph, budget_bytes))
    found = simulate(graph, dp(graph, budget_bytes))
    assert (found.peak_bytes <= budget_bytes) == (best.peak_bytes <= budget_bytes)
    assert best.peak_bytes > budget_bytes or found.step_us == best.step_us


@given(training_steps(), st.floats(0, 10))
def test_a_cut_is_the_cheapest_choice_at_its_price(graph: Graph, price: float) -> None:
    problem = KeepProblem(graph, graph.outputs)

    def cost(kept: frozenset[int]) -> float:
        kept_bytes, time_us = problem.cost(kept)
        return price * kept_bytes + time_us

    best = cost(problem.keep_at(price))
    candidates = [i for i, s in enumerate(graph.storages) if s.kind == "activation" and i not in graph.outputs]
    for bits in range(1 << min(len(candidates), 7)):
        kept = frozenset(s for i, s in enumerate(candidates) if bits >> i & 1)
        if set(problem.ops).isdisjoint(i for i, op in enumerate(graph.ops) if op.pinned):
            assert best <= cost(kept) + 1e-6


def as_minimum_cut(graph: Graph, price: float) -> nx.DiGraph[str]:
    """The network of `solvers.mincut`, for the algorithms of networkx; an arc without a capacity bears any flow."""
    net: nx.DiGraph[str] = nx.DiGraph()
    net.add_nodes_from(("source", "sink"))
    chosen = {s for op in graph.ops[: graph.forward_count] for s in op.writes if s not in graph.outputs}
    for storage in chosen:
        net.add_edge(f"s{storage}", f"o{graph.producer[storage]}", capacity=price * graph.storages[storage].size_bytes)
    for op in graph.backward_ops:
        net.add_edges_from(("source", f"s{storage}") for storage in op.reads if storage in chosen)
    for index, op in enumerate(graph.ops[: graph.forward_count]):
        net.add_edge(f"o{index}", "sink", capacity=op.time_us)
        net.add_edges_from((f"o{index}", f"s{storage}") for storage in op.reads if storage in chosen)
    return net


@given(training_steps(), st.floats(0, 10))
@settings(max_examples=200)
def test_a_cut_is_as_cheap_as_the_one_that_networkx_finds(graph: Graph, price: float) -> None:
    problem = KeepProblem(graph, graph.outputs)
    least, _ = nx.minimum_cut(as_minimum_cut(graph, price), "source", "sink")
    kept_bytes, time_us = problem.cost(problem.keep_at(price))
    assert price * kept_bytes + time_us == pytest.approx(least, rel=1e-9, abs=1e-6)


@given(training_steps())
def test_keeping_everything_is_the_plain_step_and_nothing_is_made_twice(graph: Graph) -> None:
    assert schedule_keeping(graph, range(len(graph.storages))) == plain(graph)
    assert set(schedule_keeping(graph, ()).repeats().values()) <= {1}


@given(steps, st.sampled_from(get_args(Where)), st.sampled_from((0, 2, 4)))
def test_segments_divide_the_step(graph: Graph, where: Where, longest_ops: int) -> None:
    segments = cut(graph, where=where, longest_ops=longest_ops)
    assert list(segments.forward_cuts) == sorted(segments.forward_cuts)
    assert list(segments.backward_cuts) == sorted(segments.backward_cuts, reverse=True)
    assert (segments.forward_cuts[0], segments.forward_cuts[-1]) == (0, graph.forward_count)
    assert (segments.backward_cuts[0], segments.backward_cuts[-1]) == (len(graph.ops), graph.forward_count)
    assert len(segments.merged(2)) <= 2


def test_blocks_are_alike_if_ops_sizes_and_times_are() -> None:
    graph = chain((8,) * 6, last_bytes=8)
    even = replace(graph, ops=tuple(replace(op, time_us=1.0) for op in graph.ops))
    for step, alike in ((graph, False), (even, True)):
        blocks = Blocks(step, cut(step))
        assert (blocks.block(2, 2).key == blocks.block(3, 3).key) is alike


def test_uniform_keeps_every_kth_boundary() -> None:
    graph = chain((10, 10, 10, 10, 10), last_bytes=10)
    schedule = SOLVERS["uniform"].function(graph, 0, k=2)
    assert schedule.repeats() == {0: 1, 2: 1, 4: 1}
    assert SOLVERS["uniform"].function(graph, 0, k=1) == plain(graph)
    with pytest.raises(SolverError, match="at least 1"):
        SOLVERS["uniform"].function(graph, 0, k=0)


def test_sqrt_needs_less_than_everything_on_a_long_chain() -> None:
    graph = chain((10,) * 36, weight_bytes=0, last_bytes=10)
    timeline = simulate(graph, SOLVERS["sqrt"].function(graph, 0))
    assert timeline.peak_bytes < 0.5 * simulate(graph, plain(graph)).peak_bytes
    assert set(timeline.schedule.repeats().values()) == {1}


def test_selective_recomputes_what_has_no_flops() -> None:
    graph = chain((10, 20, 40))
    cheap = replace(graph, ops=tuple(replace(op, flops=0) if op.name == "f1" else op for op in graph.ops))
    assert SOLVERS["selective"].function(graph, 0) == plain(graph)
    assert SOLVERS["selective"].function(cheap, 0).repeats() == {1: 1}


def test_collection_keeps_what_it_is_told() -> None:
    graph = chain((10, 20, 40))
    named = replace(graph, ops=tuple(replace(op, module=f"blocks.{i // 2}.lin") for i, op in enumerate(graph.ops)))
    assert solve(named, 10**6, "collection", keep=["f0", "f1", "f2"]).schedule == plain(graph)
    assert solve(named, 10**6, "collection", keep=["blocks.0"]).schedule.repeats() == {0: 1, 2: 1}
    assert solve(named, 10**6, "collection", keep="blocks").schedule.repeats() == {0: 1, 1: 1, 2: 1}
    with pytest.raises(SolverError, match=r"no module and no forward op 'block'.*blocks"):
        solve(named, 10**6, "collection", keep=["block"])


def test_deep_chains_are_recomputed_within_recomputation() -> None:
    graph = chain((10,) * 24, weight_bytes=0, last_bytes=10)
    lowest = simulate(graph, SOLVERS["min_memory"].function(graph, 0))
    single_level = simulate(graph, SOLVERS["sqrt"].function(graph, 0))
    assert lowest.peak_bytes < single_level.peak_bytes
    assert max(lowest.schedule.repeats().values()) > 1


@settings(max_examples=15)
@given(training_steps())
def test_the_frontier_goes_from_the_floor_to_the_plain_step(graph: Graph) -> None:
    timelines = frontier(graph, effort="fast")
    assert timelines == [simulate(graph, timeline.schedule) for timeline in timelines]
    assert timelines[-1].recompute_us == 0
    for tight, loose in pairwise(timelines):
        assert tight.peak_bytes < loose.peak_bytes
        assert tight.step_us > loose.step_us


def test_efforts_are_ordered() -> None:
    graph = chain((10, 20, 40, 30, 20, 10, 30))
    budget_bytes = int(0.55 * simulate(graph, plain(graph)).peak_bytes)
    fast, default = (simulate(graph, dp(graph, budget_bytes, effort=e)).step_us for e in ("fast", "default"))
    assert default <= fast


def test_the_same_call_gives_the_same_schedule() -> None:
    graph = chain((10, 20, 40, 30, 20, 10, 30))
    budget_bytes = int(0.75 * simulate(graph, plain(graph)).peak_bytes)
    assert len({solve(graph, budget_bytes).schedule for _ in range(3)}) == 1


def test_a_function_of_your_own_is_a_solver() -> None:
    def everything(graph: Graph, budget_bytes: int) -> Schedule:
        return plain(graph) if budget_bytes else Schedule((), 0)

    solution = solve(chain(), 10**6, everything)
    assert (solution.solver, solution.timeline.recompute_us) == ("everything", 0)
    with pytest.raises(SolverError, match="everything returned what is not a valid schedule"):
        solve(chain(), 0, everything)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(chain(), 10, "knapsack"), "no solver 'knapsack'; choose one of auto, dp"),
        (lambda: solve(chain(), 10, "save_all", k=3), "solver save_all can't be called with options"),
        (lambda: solve(chain(), 10, "collection"), "missing a required argument: 'keep'"),
    ],
)
def test_mistakes_in_the_call_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SolverError, match=message):
        call()


def test_an_infeasible_budget_says_what_makes_the_floor() -> None:
    graph = chain((10, 20, 40))
    named = replace(graph, ops=tuple(replace(op, module="body.lin", source="model.py:7") for op in graph.ops))
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(named, graph.static_bytes + 1)
    error = caught.value
    text = str(error)
    assert f"({error.floor_bytes} bytes)" in text
    assert "temporaries" in text
    assert "of module body.lin at model.py:7" in text
    assert f"Raise the budget to {error.floor_bytes} bytes" in text
    with pytest.raises(InfeasibleBudgetError, match="which no recomputation lowers"):
        solve(named, 1)
    with pytest.raises(InfeasibleBudgetError, match="Solver dp may reach a smaller peak"):
        solve(named, graph.static_bytes + 1, "save_all")
