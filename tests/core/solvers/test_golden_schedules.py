"""The schedules of the frozen graphs, to the last op: what must not change unless a solver is meant to change.

`tests/golden/schedules/GRAPH.txt` has a line for each way to count gradients, solver and budget: hashes of the schedule
and of its simulation (every lifetime and every step's bytes), peak, time and time repeated. The first line has the
graph's own hashes, on which it depends whether a saved plan is still valid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import SOLVERS

GRAPHS = Path(__file__).parents[3] / "benchmarks" / "graphs"
QUICK = ("bottleneck1", "gpt1", "towers8", "unet1", "vit6")
FRACTIONS = (0.8, 0.5, 0.25)
SEARCHING = ("auto", "dp", "uniform", "sqrt", "treeverse")
FIXED = ("save_all", "selective", "min_memory")


def digest(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()[:12]


def lines(name: str) -> Iterator[str]:
    graph = Graph.from_dict(json.loads((GRAPHS / f"{name}.json").read_text()))
    yield f"{name} {graph.fingerprint} {graph.structure} {graph.step_us!r}"
    for allocated in (False, True):
        accounted = graph.with_gradients(allocated)
        span_bytes = simulate(accounted, plain(accounted)).peak_bytes - accounted.static_bytes
        budgets = {str(ratio): accounted.static_bytes + int(ratio * span_bytes) for ratio in FRACTIONS}
        runs = [(solver, ratio) for solver in SEARCHING for ratio in budgets] + [(solver, "-") for solver in FIXED]
        for solver, ratio in runs:
            gradients = "allocated" if allocated else "fresh"
            yield f"{gradients} {solver} {ratio} {line(accounted, solver, budgets.get(ratio, 0))}"


def line(graph: Graph, solver: str, budget_bytes: int) -> str:
    method = SOLVERS[solver]
    options = {"effort": "fast"} if method.searches else {}
    timeline = simulate(graph, method.function(graph, budget_bytes, **options))
    schedule = digest([timeline.schedule.order, timeline.schedule.forward_steps])
    lives = [[x.storage, x.born, x.dies, x.recomputed] for x in timeline.lifetimes]
    simulated = digest([lives, timeline.live_bytes.tolist(), timeline.start_us.tolist(), timeline.saved])
    return f"{schedule} {simulated} {timeline.peak_bytes} {timeline.step_us!r} {timeline.recompute_us!r}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in sorted(GRAPHS.glob("*.json"))
    ],
)
def test_schedules_of_frozen_graphs_are_what_they_were(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"schedules/{name}", "\n".join(lines(name)) + "\n")
