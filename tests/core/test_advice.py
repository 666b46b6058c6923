"""Advice on steps made by hand: the verdict, what fills the memory, and what would help."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxckpt.core.advice import Advice, Verdict
from fxckpt.core.graph import Graph
from fxckpt.core.pareto import Pareto
from fxckpt.core.plans import Plan
from fxckpt.core.report.prose import closing_text
from fxckpt.core.schedule import Schedule, plain
from tests.support.strategies import chain

LAYERS = (10,) * 12


def steps(weight_bytes: int = 0, reserved_bytes: int = 0) -> Pareto:
    graph = replace(chain(LAYERS, weight_bytes=weight_bytes, last_bytes=10), reserved_bytes=reserved_bytes)
    return Pareto.of(graph, effort="fast", cost_model="hand")


@pytest.fixture(scope="module")
def found() -> Pareto:
    return steps()


def test_verdicts_follow_from_budget_floor_and_price(found: Pareto) -> None:
    plain_bytes, floor_bytes = found.baseline.peak_bytes, found.points[0].peak_bytes
    verdicts: dict[int | None, Verdict] = {
        plain_bytes: "unnecessary",
        plain_bytes - 1: "worthwhile",
        floor_bytes: "expensive",
        floor_bytes - 1: "not enough",
        None: "worthwhile",
    }
    for budget_bytes, verdict in verdicts.items():
        advice = Advice(found, budget_bytes=budget_bytes)
        assert advice.verdict == verdict
        assert str(advice)
    assert found.points[0].recompute_us > 0.3 * found.baseline.step_us >= Advice(found).knee.recompute_us
    assert Advice(steps(weight_bytes=1000)).verdict == "of little use"


def test_a_budget_is_shown_with_what_it_costs(found: Pareto) -> None:
    budget_bytes = (found.baseline.peak_bytes + found.points[0].peak_bytes) // 2
    advice = Advice(found, budget_bytes=budget_bytes)
    assert advice.chosen == found.at(budget_bytes).predicted
    assert "  budget  " in str(advice)
    assert "  budget  " not in str(Advice(found))
    assert f"{advice.chosen.recompute_us / found.baseline.step_us:.1%}" in str(advice)


@pytest.mark.parametrize(
    ("weight_bytes", "reserved_bytes", "dominant", "remedy"),
    [
        (0, 0, "saved", "smaller batch"),
        (1000, 0, "parameters and buffers", "adapters"),
        (1, 5000, "reserved", "optimizer that keeps less state"),
    ],
)
def test_what_dominates_is_named_with_its_remedy(
    weight_bytes: int, reserved_bytes: int, dominant: str, remedy: str
) -> None:
    advice = Advice(steps(weight_bytes, reserved_bytes), optimizer_bytes=reserved_bytes)
    assert advice.dominant == dominant
    assert sum(advice.breakdown.values()) == advice.baseline.peak_bytes
    assert remedy in str(advice)
    assert ("Reserved for the optimizer's state: 4.88 KiB" in str(advice)) == (reserved_bytes == 5000)


def logits(graph: Graph) -> Graph:
    """The last activation is far the largest."""
    large = tuple(replace(s, size_bytes=10**6) if s.name in ("a12", "tangent") else s for s in graph.storages)
    ops = tuple(replace(op, module="head", source="model.py:9") if op.name == "f12" else op for op in graph.ops)
    return replace(graph, storages=large, ops=ops)


def test_one_large_tensor_is_named() -> None:
    found = Pareto.of(logits(chain(LAYERS, last_bytes=10)), effort="fast")
    advice = Advice(found)
    assert advice.largest is not None
    assert advice.largest.size_bytes == 10**6
    assert "977 KiB written by layer in head, model.py:9" in str(advice)
    assert Advice(steps()).largest is None


def test_the_closing_text_says_gain_price_and_rest() -> None:
    graph = chain(LAYERS, weight_bytes=0, last_bytes=10)
    kept = Plan(graph, plain(graph), "hand", "hand", 10**6)
    assert closing_text(kept).startswith(
        "Nothing is recomputed: it fits as it is. Now the largest part of the peak is "
    )
    plan = Pareto.of(graph, effort="fast").knee()
    text = closing_text(plan)
    saved_bytes = plan.baseline.peak_bytes - plan.predicted.peak_bytes
    price = plan.predicted.recompute_us / plan.baseline.step_us
    assert text.startswith(f"Recomputing saves {saved_bytes} B and adds {price:.1%} to the time of a step")
    assert text == closing_text(Plan.from_json(plan.to_json()))
    empty = Plan(Graph((), (), 0), Schedule((), 0), "hand", "hand", 1)
    assert closing_text(empty).endswith("Now it takes no memory.")
