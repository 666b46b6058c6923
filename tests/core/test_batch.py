"""The largest batch: found exactly, with few tries, on steps made by hand whose sizes grow with the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fxckpt.core.batch import MaxBatch, largest_batch
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import lowest, solve
from fxckpt.errors import InfeasibleBudgetError
from tests.support.strategies import chain

Growth = Callable[[int], int]
GROWTHS: dict[str, Growth] = {
    "even": lambda batch: batch,
    "in steps": lambda batch: -(-batch // 8) * 8,
    "with its square": lambda batch: batch + batch * batch // 50,
    "with its root": lambda batch: int(40 * batch**0.5),
}


def step(size: int) -> Graph:
    return chain((10 * size, 20 * size, 40 * size, 10 * size), weight_bytes=100, last_bytes=size)


def floor_bytes(graph: Graph) -> int:
    return lowest(graph, "dp", effort="fast").timeline.peak_bytes


@pytest.mark.parametrize("growth", GROWTHS.values(), ids=list(GROWTHS))
@pytest.mark.parametrize("right", [1, 2, 3, 37, 150])
def test_the_largest_batch_is_found(growth: Growth, right: int) -> None:
    budget_bytes = floor_bytes(step(growth(right)))
    found = largest_batch(
        lambda batch: step(growth(batch)),
        budget_bytes,
        "dp",
        {"effort": "fast"},
        least=1,
        most=1000,
        cost_model="hand",
        progress=False,
    )
    assert floor_bytes(step(growth(found.batch_size))) <= budget_bytes
    assert found.batch_size == 1000 or floor_bytes(step(growth(found.batch_size + 1))) > budget_bytes
    assert found.batch_size >= right
    assert found.plan.predicted.peak_bytes <= budget_bytes
    assert found.plan.graph.fingerprint == step(growth(found.batch_size)).fingerprint
    sizes = [one.batch_size for one in found.tries]
    assert len(set(sizes)) == len(sizes) <= 20  # bisection of 1 to 1000 alone would take 10
    assert growth is not GROWTHS["even"] or len(sizes) <= 8
    assert f"a batch of {found.batch_size} fits" in str(found)


def overhead(graph: Graph, budget_bytes: int) -> float:
    """What the fastest step in a budget adds to the plain step's time."""
    timeline = solve(graph, budget_bytes, "dp", effort="fast").timeline
    return timeline.recompute_us / simulate(graph, plain(graph)).step_us


@pytest.mark.parametrize(("right", "max_overhead"), [(37, 0.0), (37, 0.2), (37, 0.5), (150, 0.1)])
def test_the_largest_batch_at_a_price_is_found(right: int, max_overhead: float) -> None:
    def search(**bound: float) -> MaxBatch:
        options = {"effort": "fast"}
        return largest_batch(
            deep, budget_bytes, "dp", options, least=1, most=1000, cost_model="hand", progress=False, **bound
        )

    def deep(batch: int) -> Graph:
        return chain((10 * batch,) * 12, weight_bytes=10, last_bytes=batch)

    budget_bytes = (simulate(deep(right), plain(deep(right))).peak_bytes + floor_bytes(deep(right))) // 2
    found, at_any_price = search(max_overhead=max_overhead), search()
    plan = found.plan
    assert plan.predicted.peak_bytes <= budget_bytes
    assert plan.predicted.recompute_us <= max_overhead * plan.baseline.step_us
    assert overhead(deep(found.batch_size + 1), budget_bytes) > max_overhead
    assert found.batch_size < at_any_price.batch_size
    if not max_overhead:
        assert simulate(deep(found.batch_size), plain(deep(found.batch_size))).peak_bytes <= budget_bytes
    assert len(found.tries) <= (8 if max_overhead <= 0.2 else 20)


def test_not_even_the_least_fits_at_a_price() -> None:
    least_bytes = simulate(step(4), plain(step(4))).peak_bytes
    with pytest.raises(InfeasibleBudgetError, match=r"if recomputing may add 0.0% .* allow a larger max_overhead"):
        largest_batch(
            step,
            floor_bytes(step(4)),
            "dp",
            {"effort": "fast"},
            least=4,
            most=9,
            cost_model="hand",
            max_overhead=0.0,
            progress=False,
        )
    assert least_bytes > floor_bytes(step(4))


def test_bounds_are_kept() -> None:
    def search(least: int, most: int) -> int:
        found = largest_batch(
            step, 10**6, "dp", {"effort": "fast"}, least=least, most=most, cost_model="hand", progress=False
        )
        assert all(least <= one.batch_size <= most for one in found.tries)
        return found.batch_size

    assert search(1, 64) == 64
    assert search(5, 5) == 5


def test_not_even_the_least_fits() -> None:
    least_bytes = floor_bytes(step(4))
    with pytest.raises(InfeasibleBudgetError, match=f"a batch of 4 takes .*{least_bytes} bytes") as caught:
        largest_batch(
            step, least_bytes - 1, "dp", {"effort": "fast"}, least=4, most=9, cost_model="hand", progress=False
        )
    assert caught.value.floor_bytes == least_bytes


def test_progress_is_shown_on_stderr_only_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        largest_batch(step, 10**4, "dp", {"effort": "fast"}, least=1, most=3, cost_model="hand", progress=progress)
        shown = capsys.readouterr()
        assert (shown.out, "largest batch" in shown.err) == ("", progress)
