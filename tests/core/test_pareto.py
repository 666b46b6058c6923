"""The whole curve: from the floor to the plain step, and as good as what the solver finds budget by budget."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings

from fxckpt.core.graph import Graph
from fxckpt.core.pareto import Pareto
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import lowest, solve
from fxckpt.errors import BudgetError, InfeasibleBudgetError, SolverError
from tests.support.strategies import chain, training_steps

LAYERS = (10, 20, 40, 30, 20, 10, 30, 20, 40, 10)


@pytest.fixture(scope="module")
def found() -> Pareto:
    return Pareto.of(chain(LAYERS, last_bytes=10), effort="fast", cost_model="hand")


@settings(max_examples=8)
@given(graph=training_steps())
def test_a_curve_goes_from_the_solvers_floor_to_the_plain_step(graph: Graph) -> None:
    found = Pareto.of(graph, effort="fast")
    assert found.points[0].peak_bytes == lowest(graph, "dp", effort="fast").timeline.peak_bytes
    assert found.points[-1].step_us == found.baseline.step_us
    for tight, loose in pairwise(found.points):
        assert tight.peak_bytes < loose.peak_bytes
        assert tight.step_us > loose.step_us


@pytest.mark.parametrize("ratio", [0.55, 0.65, 0.75, 0.85, 0.95])
def test_its_points_are_about_what_the_solver_finds(found: Pareto, ratio: float) -> None:
    """A budget's point was sought for a budget that is a thirtieth of the curve's range smaller at the most."""
    span_bytes = found.baseline.peak_bytes - found.points[0].peak_bytes
    budget_bytes = found.points[0].peak_bytes + int(ratio * span_bytes)
    ours = found.at(budget_bytes)
    theirs = solve(found.graph, budget_bytes - span_bytes // 30, "dp", effort="fast").timeline
    assert ours.predicted.peak_bytes <= budget_bytes
    assert ours.predicted.step_us <= 1.01 * theirs.step_us


def test_at_gives_the_fastest_that_fits(found: Pareto) -> None:
    for plan, faster in pairwise(found.plans):
        assert found.at(plan.predicted.peak_bytes) is plan
        assert found.at(faster.predicted.peak_bytes - 1) is plan
    assert found.at(1.0).predicted == found.baseline
    assert found.at("1GB") is found.plans[-1]
    assert found.floor is found.plans[0]


def test_a_budget_below_the_floor_is_refused(found: Pareto) -> None:
    floor_bytes = found.points[0].peak_bytes
    with pytest.raises(InfeasibleBudgetError, match="the curve begins at") as caught:
        found.at(floor_bytes - 1)
    assert (caught.value.budget_bytes, caught.value.floor_bytes) == (floor_bytes - 1, floor_bytes)
    with pytest.raises(BudgetError):
        found.at(1.5)


def test_the_knee_is_farthest_below_the_line_between_the_ends(found: Pareto) -> None:
    first, last = found.points[0], found.points[-1]

    def cross_product(point_bytes: int, point_us: float) -> float:
        to_end = (last.peak_bytes - first.peak_bytes, last.step_us - first.step_us)
        return to_end[1] * (point_bytes - first.peak_bytes) - to_end[0] * (point_us - first.step_us)

    distances = {plan.budget_bytes: cross_product(plan.budget_bytes, plan.predicted.step_us) for plan in found.plans}
    assert max(distances.values()) > 0
    assert distances[found.knee().budget_bytes] == pytest.approx(max(distances.values()))


def test_a_step_that_cannot_be_improved_is_a_curve_of_one_point() -> None:
    found = Pareto.of(Graph((), (), 0), effort="fast")
    assert (len(found.plans), found.knee()) == (1, found.floor)
    assert "floor, knee, plain" in str(found)


def test_json_and_text_have_the_figures(found: Pareto) -> None:
    data = json.loads(found.to_json())
    assert data["fingerprint"] == found.graph.fingerprint
    assert [point["peak_bytes"] for point in data["points"]] == [point.peak_bytes for point in found.points]
    assert data["baseline"]["step_us"] == found.baseline.step_us
    lines = str(found).splitlines()
    assert lines[2].rstrip().endswith("floor")
    assert lines[-1].rstrip().endswith("plain")
    assert any("knee" in line for line in lines)
    assert len(lines) <= 25
    assert repr(found).startswith(f"Pareto(solver='dp', plans={len(found.plans)}, from")
    assert len(repr(found)) < 200


@pytest.mark.parametrize("solver", ["uniform", "sqrt", "selective", "save_all"])
def test_other_solvers_have_curves_too(solver: str) -> None:
    graph = chain(LAYERS, last_bytes=10)
    found = Pareto.of(graph, solver)
    assert found.solver == solver
    assert found.points[0].peak_bytes <= lowest(graph, solver).timeline.peak_bytes
    assert found.points[-1].step_us == found.baseline.step_us
    for tight, loose in pairwise(found.points):
        assert tight.peak_bytes < loose.peak_bytes
        assert tight.step_us > loose.step_us


def test_a_function_of_ones_own_has_a_curve_by_its_name() -> None:
    def nothing(graph: Graph, budget_bytes: int) -> Schedule:  # noqa: ARG001
        return plain(graph)

    found = Pareto.of(chain(), nothing)
    assert (found.solver, len(found.plans)) == ("nothing", 1)
    assert simulate(found.graph, found.timelines[0].schedule).recompute_us == 0


def test_options_are_the_solvers() -> None:
    graph = chain(LAYERS, last_bytes=10)
    two, all_k = Pareto.of(graph, "uniform", k=2), Pareto.of(graph, "uniform")
    assert len(two.plans) == 2  # the plain step and one schedule
    assert len(all_k.plans) > 2
    with pytest.raises(SolverError, match="uniform has no effort"):
        Pareto.of(graph, "uniform", effort="fast")
