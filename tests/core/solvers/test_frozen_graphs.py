"""What `dp` reaches on the graphs of real models that are kept in `benchmarks/graphs`."""

from __future__ import annotations

import json

import pytest

from benchmarks.optimality import FRACTIONS, GRAPHS, REFERENCE, Problem, accounted, ours
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers.chain.dp import dp

WITHIN_POINTS = 0.2
"""How much more overhead than the reference is allowed, in percent of the plain step."""


def problem(name: str, accounting: str) -> Problem:
    graph = Graph.from_dict(json.loads((GRAPHS / f"{name}.json").read_text()))
    return Problem(name, accounting, accounted(graph, accounting))


@pytest.mark.slow
@pytest.mark.parametrize("key", REFERENCE["floor_ratio"])
def test_the_reference_frontier_is_met(key: str) -> None:
    name, _, accounting = key.partition(" ")
    found = ours(problem(name, accounting), "dp", {"effort": "default"})
    assert found["floor_ratio"] <= REFERENCE["floor_ratio"][key] + 0.01
    for fraction, percent, reference in zip(
        FRACTIONS, found["overhead_percent"], REFERENCE["overhead_percent"][key], strict=True
    ):
        if reference is not None:
            assert percent is not None, fraction
            assert percent <= reference + WITHIN_POINTS, fraction


@pytest.mark.slow
@pytest.mark.parametrize("accounting", ["fresh", "allocated"])
def test_a_thousand_layers_take_a_seventh_of_the_memory_for_a_quarter_of_the_flops(accounting: str) -> None:
    """Chen, Xu, Zhang and Guestrin (2016), arXiv:1604.06174: 48 GB to 7 GB for 1,000 residual layers, +30 % time."""
    deep = problem("resmlp1000", accounting)
    found = simulate(deep.graph, dp(deep.graph, deep.budget_bytes(7 / 48), effort="fast"))
    assert deep.ratio(found.peak_bytes) <= 7 / 48
    flops = [op.flops for op in deep.graph.ops]
    repeated = sum(flops[op] * count for op, count in found.schedule.repeats().items())
    assert repeated <= 0.26 * sum(flops)


@pytest.mark.slow
def test_the_floor_of_a_thousand_layers_is_a_hundredth() -> None:
    deep = problem("resmlp1000", "allocated")
    lowest = simulate(deep.graph, dp(deep.graph, 0, effort="fast"))
    assert deep.ratio(lowest.peak_bytes) <= 0.01
    assert simulate(deep.graph, plain(deep.graph)).peak_bytes == deep.budget_bytes(1.0)
