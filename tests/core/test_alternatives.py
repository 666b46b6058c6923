"""Other ways to have a storage: which a graph may have, and that the plain step and solvers stay what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.optimality import GRAPHS
from fxckpt.core import schedule as schedules
from fxckpt.core.decisions import decisions
from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.report.film import cells_of
from fxckpt.core.report.page import page
from fxckpt.core.report.table import plan_text
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import SOLVERS
from fxckpt.errors import InvalidScheduleError, PlanFormatError
from tests.support.strategies import (
    chain,
    graphs_with_alternatives,
    steps_with_alternatives,
    training_steps,
    with_offload,
)

A0, HOST = 5, 17  # of chain(): the activation a0, and its copy on the host once there is one
OFFLOADING = Schedule((0, 1, 8, 2, 9, 3, 4, 10, 5, 6, 7), 6)  # a0 is sent behind f1, gone behind f2, fetched before b2


def offload() -> Graph:
    return with_offload(chain(), A0, out_us=2.0, in_us=3.0)


def compressed() -> Graph:
    """A copy of a2 of a tenth of its bytes, by compute: what it is packed to and unpacked from."""
    small = Storage("a2.small", 4, "activation")
    ops = (Op("pack", "pack", (7,), (17,)), Op("unpack", "unpack", (17,), (7,)))
    return replace(chain(), ops=(*chain().ops, *ops), storages=(*chain().storages, small), alternatives=2)


def test_alternatives_stand_behind_the_plain_ops() -> None:
    graph = offload()
    graph.check()
    assert (graph.plain_count, graph.alternatives, len(graph.ops)) == (8, 3, 11)
    assert graph.plain_ops == chain().ops
    assert graph.backward_ops == chain().ops[4:]
    assert graph.producer == (*chain().producer, -1)
    assert graph.ways[A0] == (10,)
    assert graph.ways[HOST] == (8,)
    assert not any(ways for s, ways in enumerate(graph.ways) if s not in (A0, HOST))
    assert graph.asynchronous == {8, 10}
    assert graph.step_us == chain().step_us
    assert graph.static_bytes == chain().static_bytes


@given(graphs_with_alternatives())
def test_the_plain_step_is_what_it_is_without_them(graph: Graph) -> None:
    graph.check()
    host = [i for i in range(len(graph.storages)) if graph.producer[i] < 0 and graph.ways[i]]
    without = replace(
        graph, ops=graph.plain_ops, storages=graph.storages[: min(host, default=len(graph.storages))], alternatives=0
    )
    without.check()
    assert plain(graph) == plain(without)
    step, alone = simulate(graph, plain(graph)), simulate(without, plain(without))
    assert step.lifetimes == alone.lifetimes
    assert step.live_bytes.tolist() == alone.live_bytes.tolist()
    assert (step.step_us, step.recompute_us) == (alone.step_us, alone.recompute_us)
    assert step.start_us.tolist() == alone.start_us.tolist()
    assert (graph.fingerprint == without.fingerprint) == (graph == without)


def test_the_fingerprint_knows_alternatives_engines_and_places() -> None:
    graph = offload()
    others = [
        chain(),
        replace(graph, ops=tuple(replace(op, engine="compute") for op in graph.ops)),
        replace(graph, storages=tuple(replace(s, place="device") for s in graph.storages)),
        replace(graph, storages=tuple(replace(s, place="disk") if s.place == "host" else s for s in graph.storages)),
        compressed(),
    ]
    assert len({g.fingerprint for g in (graph, *others)}) == 1 + len(others)
    assert len({g.structure for g in (graph, *others)}) == 1 + len(others)


BROKEN: dict[str, Callable[[Graph], Graph]] = {
    "more alternatives than ops": lambda g: replace(g, alternatives=12),
    "fewer than none": lambda g: replace(g, alternatives=-1),
    "forward reaches into them": lambda g: replace(g, forward_count=9),
    "what was an alternative is plain": lambda g: replace(g, alternatives=0),
    "what was plain is an alternative": lambda g: replace(g, alternatives=5),
    "ordered": lambda g: change(g, 10, ordered=True),
    "unknown engine": lambda g: change(g, 10, engine="gpu"),
    "unknown place": lambda g: store(g, HOST, place="cloud"),
    "reads what nothing writes": lambda g: change(g, 10, reads=(HOST + 1,)),
    "reads what a later one writes": lambda g: replace(g, ops=(*g.ops[:8], g.ops[10], *g.ops[8:10])),
    "writes a parameter": lambda g: change(g, 10, writes=(1,)),
    "writes a tangent": lambda g: change(g, 10, writes=(9,)),
    "writes state that is replayed": lambda g: change(change(g, 0, replay=(HOST,)), 10, writes=(HOST,)),
    "nobody writes a storage": lambda g: replace(g, storages=(*g.storages, Storage("b", 1, "activation"))),
    "a plain op writes a parameter": lambda g: change(g, 0, writes=(A0, 1)),
    "two plain ops write a storage": lambda g: change(g, 1, writes=(A0, 6)),
    "an op writes a storage twice": lambda g: change(g, 0, writes=(A0, A0)),
    "an output that only they write": lambda g: replace(g, outputs=(HOST,)),
    "a gradient that only they write": lambda g: replace(g, gradients=(HOST,)),
    "an update that only they write": lambda g: replace(g, updates=(HOST,)),
    "a plain op reads what only they write": lambda g: change(g, 7, reads=(HOST,)),
}


def change(graph: Graph, index: int, **changes: Any) -> Graph:
    return replace(graph, ops=(*graph.ops[:index], replace(graph.ops[index], **changes), *graph.ops[index + 1 :]))


def store(graph: Graph, index: int, **changes: Any) -> Graph:
    changed = replace(graph.storages[index], **changes)
    return replace(graph, storages=(*graph.storages[:index], changed, *graph.storages[index + 1 :]))


@pytest.mark.parametrize("what", BROKEN)
def test_broken_graphs_are_refused(what: str) -> None:
    graph = BROKEN[what](offload())
    with pytest.raises(ValueError, match=r"alternative|plain op|storage|engine|forward_count|reads"):
        graph.check()
    with pytest.raises(PlanFormatError, match="not a graph written by fxckpt"):
        Graph.from_dict(json.loads(json.dumps(graph.to_dict())))


@given(graphs_with_alternatives())
def test_json_round_trip(graph: Graph) -> None:
    copy = Graph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert (copy, copy.fingerprint, copy.structure) == (graph, graph.fingerprint, graph.structure)


@given(steps_with_alternatives())
def test_plans_round_trip_and_can_be_shown(drawn: tuple[Graph, Schedule]) -> None:
    plan = Plan(*drawn, solver="hand", cost_model="hand", budget_bytes=7)
    copy = Plan.from_json(plan.to_json())
    assert (copy, copy.predicted) == (plan, plan.predicted)
    assert plan_text(copy, all=True) == plan_text(plan, all=True)
    assert len(cells_of(plan.graph).column) == len(plan.graph.ops)
    if plan.graph.ops and len(plan.schedule):
        assert page(plan) == page(copy)


def test_what_comes_back_another_way_is_said_to() -> None:
    plan = Plan(offload(), OFFLOADING, "hand", "hand", 130)
    decided = decisions(plan.timeline, plan.baseline_timeline)
    assert [decided[s].action for s in (5, 6, 7, 8)] == ["restore", "keep", "keep", "keep"]
    assert decided[A0].reason == "brought back by fetch_a0"
    twice = Plan(offload(), Schedule((0, 1, 8, 2, 9, 3, 10, 4, 10, 5, 6, 7), 6), "hand", "hand", 130)
    again = decisions(twice.timeline, twice.baseline_timeline)
    assert (again[A0].action, again[6].action) == ("restore", "keep")
    assert not any(life.recomputed for life in twice.timeline.lifetimes)
    assert (decided[A0].repeat_us, decided[A0].freed_bytes, decided[A0].runs) == (3.0, 10, 1)
    text = plan_text(plan, all=True)
    assert "restore" in text
    assert "4 forward and 4 backward ops" in text
    data = re.search('type="application/json">(.*)</script>', page(plan))
    assert data is not None
    assert HOST not in json.loads(data[1])["lifetimes"]["storage"]


def test_schedules_may_have_them_in_either_half() -> None:
    graph = offload()
    for schedule in (
        OFFLOADING,
        Schedule((0, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7), 7),
        Schedule((0, 1, 2, 3, 4, 5, 8, 9, 10, 6, 7), 4),
        Schedule((0, 8, 10, 10, 1, 9, 2, 3, 8, 4, 5, 6, 7), 9),
    ):
        schedules.check(graph, schedule)
    assert OFFLOADING.repeats() == {}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 2, 3, 10, 4, 5, 6, 7), "step 4 runs fetch_a0, which reads a0.host before anything writes it"),
        ((8, 0, 1, 2, 3, 4, 5, 6, 7), "step 0 runs send_a0, which reads a0 before"),
        ((0, 1, 2, 3, 11, 4, 5, 6, 7), "step 4 names op 11, but there are 11"),
    ],
)
def test_what_they_read_must_be_there(order: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidScheduleError, match=message):
        schedules.check(offload(), Schedule(order, 5))


def test_a_plain_op_may_be_left_to_its_alternative_unless_it_has_an_effect() -> None:
    graph = chain()
    twin = replace(graph, ops=(*graph.ops, replace(graph.ops[0], name="twin")), alternatives=1)
    schedules.check(twin, Schedule((8, 1, 2, 3, 4, 5, 6, 7), 4))
    drawing = change(twin, 0, ordered=True)
    with pytest.raises(InvalidScheduleError, match="f0, which draws random numbers or has an effect, never ran"):
        schedules.check(drawing, Schedule((8, 1, 2, 3, 4, 5, 6, 7), 4))


def test_copies_that_compute_makes_are_free_at_once() -> None:
    """The same pair as ordinary ops: the original dies where it has been copied."""
    graph = replace(offload(), ops=tuple(replace(op, engine="compute") for op in offload().ops))
    timeline = simulate(graph, Schedule((0, 1, 8, 2, 3, 4, 10, 5, 6, 7), 5))
    assert timeline.live_bytes.tolist() == [33, 53, 53, 83, 84, 129, 98, 122, 76, 50]
    assert (timeline.step_us, timeline.recompute_us) == (35.0, 5.0)


# Solvers that know nothing of alternatives


def schedules_of(graph: Graph, budget_bytes: int, keep: tuple[str, ...]) -> dict[str, Schedule]:
    """What each solver makes of a graph."""
    options: dict[str, dict[str, Any]] = {"collection": {"keep": keep}}
    options |= {name: {"effort": "fast"} for name, method in SOLVERS.items() if method.searches}
    small = graph.plain_count <= 12
    return {
        name: method.function(graph, budget_bytes, **options.get(name, {}))
        for name, method in SOLVERS.items()
        if small or not method.exact
    }


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("make", [chain, lambda: chain((10, 20, 40, 30), last_bytes=5)], ids=["four", "five"])
def test_solvers_return_the_same_schedules_with_them(make: Callable[[], Graph], ratio: float) -> None:
    graph = make()
    both = with_offload(with_offload(graph, graph.producer.index(0)), graph.producer.index(1), out_us=1.0, in_us=1.0)
    for allocated in (False, True):
        alone, more = graph.with_gradients(allocated), both.with_gradients(allocated)
        peak_bytes = simulate(alone, plain(alone)).peak_bytes
        budget_bytes = alone.static_bytes + int(ratio * (peak_bytes - alone.static_bytes))
        found = schedules_of(more, budget_bytes, ("f1",))
        assert set(found) == set(SOLVERS)
        assert found == schedules_of(alone, budget_bytes, ("f1",))


@settings(max_examples=25)
@given(training_steps(), st.data(), st.floats(0.2, 1))
def test_solvers_of_any_step_return_the_same_schedules(graph: Graph, data: st.DataObject, ratio: float) -> None:
    written = [s for op in graph.plain_ops for s in op.writes]
    more = graph
    for storage in data.draw(st.lists(st.sampled_from(written), min_size=1, max_size=3, unique=True)):
        more = with_offload(more, storage, out_us=1.0, in_us=1.0)
    more.check()
    budget_bytes = int(ratio * simulate(graph, plain(graph)).peak_bytes)
    names = ("auto", "uniform", "sqrt", "selective", "min_memory", "treeverse", "save_all")
    for name in names:
        solver = SOLVERS[name].function
        options = {"effort": "fast"} if SOLVERS[name].searches else {}
        assert solver(more, budget_bytes, **options) == solver(graph, budget_bytes, **options)


@pytest.mark.parametrize("name", ["gpt1", "bottleneck1", pytest.param("gpt12", marks=pytest.mark.slow)])
def test_solvers_of_real_steps_return_the_same_schedules_with_them(name: str) -> None:
    graph = Graph.from_dict(json.loads((GRAPHS / f"{name}.json").read_text()))
    written = (s for op in graph.plain_ops[: graph.forward_count] for s in op.writes)
    more = graph
    for storage in sorted(written, key=lambda s: -graph.storages[s].size_bytes)[:5]:
        more = with_offload(more, storage, out_us=10.0, in_us=10.0)
    more.check()
    peak_bytes = simulate(graph, plain(graph)).peak_bytes
    budget_bytes = graph.static_bytes + (peak_bytes - graph.static_bytes) // 2
    assert schedules_of(more, budget_bytes, ()) == schedules_of(graph, budget_bytes, ())
