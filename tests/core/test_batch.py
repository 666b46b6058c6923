"""The largest batch: found exactly, with few tries, on steps made by hand whose sizes grow with the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fxckpt.batch import largest_batch
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.graph import Graph
from fxckpt.solvers import lowest
from tests.strategies import chain

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
