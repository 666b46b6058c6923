import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path as File
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fxckpt.core.decisions import decisions
from fxckpt.core.graph import Graph, Op, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.report.table import plan_text
from fxckpt.core.schedule import Schedule, check, plain
from fxckpt.core.simulate import Figures, simulate
from fxckpt.core.solvers import solve
from fxckpt.errors import PlanFormatError
from tests.support.strategies import chain, graphs_with_schedules, with_offload

GOLDEN = File(__file__).parents[1] / "golden"
SCHEDULE = Schedule((0, 1, 2, 3, 4, 0, 1, 5, 6, 7), 4)


def plan_of_first_format() -> Plan:
    """A plan for chain() that uses every field of format 1."""
    graph = chain()
    state = Storage("state", 3, "activation")
    first = Op("f0", "layer", (0, 1), (5,), (17,), 1.0, 10, 2, "", ordered=True, module="layers.0", source="m.py:1")
    graph = Graph((first, *graph.ops[1:]), (*graph.storages, state), 4, (8,), (5,), graph.gradients, False, 16, 5)
    return Plan(graph, SCHEDULE, "dp", "reference", 150)


def make_plan() -> Plan:
    """The same with an activation that is sent to the host and fetched: every field of the format."""
    graph = with_offload(plan_of_first_format().graph, 6, out_us=1.0, in_us=2.0)
    return Plan(graph, Schedule((0, 1, 8, 2, 9, 3, 4, 0, 10, 5, 6, 7), 6), "dp", "reference", 150)


def test_figures_are_those_of_the_simulation() -> None:
    plan = Plan(chain(), SCHEDULE, "dp", "reference", 130)
    assert plan.predicted == Figures(peak_bytes=122, step_us=33.0, recompute_us=3.0, saved_bytes=40)
    assert plan.baseline == Figures(peak_bytes=139, step_us=30.0, recompute_us=0.0, saved_bytes=70)
    assert plan.fingerprint == plan.graph.fingerprint


def test_what_is_simulated_once_is_not_simulated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated: list[Schedule] = []

    def counted(graph: Graph, schedule: Schedule) -> None:
        simulated.append(schedule)
        check(graph, schedule)

    monkeypatch.setattr("fxckpt.core.schedule.check", counted)  # `simulate` asks for it each time
    graph = chain()
    baseline = simulate(graph, plain(graph))
    solution = solve(graph, 130, lambda graph, budget_bytes: SCHEDULE)  # noqa: ARG005
    plan = Plan.of(solution.timeline, solver="dp", cost_model="reference", budget_bytes=130, baseline=baseline)
    assert plan.predicted.peak_bytes == plan.timeline.peak_bytes == 122
    assert plan.baseline.peak_bytes == 139
    assert decisions(plan.timeline, plan.baseline_timeline)
    assert plan_text(plan, all=True)
    twins = 2  # the figures also tell the peaks with gradients allocated
    assert len(simulated) == 2 + twins
    assert (simulated.count(SCHEDULE), simulated.count(plain(graph))) == (2, 2)


def test_a_plan_made_from_a_simulation_is_the_plan_made_from_its_schedule() -> None:
    made = Plan(chain(), SCHEDULE, "dp", "reference", 130)
    plan = Plan.of(simulate(chain(), SCHEDULE), solver="dp", cost_model="reference", budget_bytes=130)
    assert (plan, hash(plan), repr(plan), plan.to_json()) == (made, hash(made), repr(made), made.to_json())
    assert plan.baseline == made.baseline
    copy = pickle.loads(pickle.dumps(plan))
    assert (copy, copy.predicted) == (made, made.predicted)
    elsewhere = replace(plan, graph=chain((10, 20, 80)))
    assert elsewhere.timeline == simulate(chain((10, 20, 80)), SCHEDULE)


def test_what_is_printed_names_the_figures() -> None:
    text = repr(Plan(chain(), SCHEDULE, "dp", "reference", 130))
    assert text.startswith("Plan(solver='dp', budget_bytes=130, peak_bytes=122, baseline_peak_bytes=139, repeats=2, ")


def test_json_round_trip() -> None:
    plan = make_plan()
    copy = Plan.from_json(plan.to_json())
    assert copy == plan
    assert copy.predicted == plan.predicted
    assert copy.to_json() == plan.to_json()


@given(graphs_with_schedules())
def test_any_plan_round_trips(drawn: tuple[Graph, Schedule]) -> None:
    plan = Plan(*drawn, solver="dp", cost_model="measure", budget_bytes=7)
    assert Plan.from_json(plan.to_json()) == plan


def test_plans_of_the_first_format_are_read() -> None:
    text = (GOLDEN / "plan_format_1.json").read_text(encoding="utf-8")  # written before there were alternatives
    plan, data = Plan.from_json(text), json.loads(text)
    assert data["fxckpt_plan"] == 1
    assert (plan, plan.fingerprint) == (plan_of_first_format(), data["fingerprint"])
    assert (asdict(plan.predicted), asdict(plan.baseline)) == (data["predicted"], data["baseline"])
    assert json.loads(plan.to_json())["fxckpt_plan"] == json.loads(plan.to_json())["graph"]["format"] == 2
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("format_", [0, 3, -1, 1.0, 2.0, "2", None, True, [2]])
def test_other_formats_are_refused_by_name(format_: Any) -> None:
    data = json.loads(make_plan().to_json())
    with pytest.raises(PlanFormatError, match=r"the plan's format is .* up to 2 can be read"):
        Plan.from_json(json.dumps(data | {"fxckpt_plan": format_}))
    with pytest.raises(PlanFormatError, match=r"its format is .* 2 is the latest"):
        Plan.from_json(json.dumps(data | {"graph": data["graph"] | {"format": format_}}))


def test_what_only_the_second_format_has_must_be_there() -> None:
    for part, name in (("ops", "engine"), ("storages", "place")):
        data = json.loads(make_plan().to_json())
        del data["graph"][part][name]
        with pytest.raises(PlanFormatError, match=name):
            Plan.from_json(json.dumps(data))
    data = json.loads(make_plan().to_json())
    del data["graph"]["alternatives"]
    with pytest.raises(PlanFormatError, match="alternatives"):
        Plan.from_json(json.dumps(data))


def test_figures_in_a_file_are_not_believed() -> None:
    data = json.loads(make_plan().to_json())
    data["predicted"]["peak_bytes"] = 1
    assert Plan.from_json(json.dumps(data)).predicted == make_plan().predicted


def test_a_changed_graph_is_noticed() -> None:
    data = json.loads(make_plan().to_json())
    data["graph"]["storages"]["size_bytes"][5] = 11
    with pytest.raises(PlanFormatError, match="the file was changed"):
        Plan.from_json(json.dumps(data))


def test_a_schedule_that_does_not_compute_the_step_is_refused() -> None:
    data = json.loads(make_plan().to_json())
    data["order"] = data["order"][:-1]
    with pytest.raises(PlanFormatError, match="does not fit its graph: backward ends"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '"a plan"',
        "1e999",
        "NaN",
        "{" * 100_000,
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        '{"fxckpt_plan": 2}',
        '{"fxckpt_plan": 3}',
        '{"fxckpt_plan": 1}',
        '{"fxckpt_plan": true}',
        '{"fxckpt_plan": 1, "graph": []}',
        '{"fxckpt_plan": 1, "graph": {"ops": {}, "storages": {}}}',
        "\ud800",
        "\x00",
        "import os; os.abort()",
    ],
    ids=range(20),
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanFormatError):
        Plan.from_json(text)


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(PlanFormatError):
        Plan.from_json(text)


def test_a_truncated_file_is_refused() -> None:
    text = make_plan().to_json()
    for length in range(0, len(text), 7):
        with pytest.raises(PlanFormatError):
            Plan.from_json(text[:length])


def test_a_file_that_is_too_large_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxckpt.core.plans._LARGEST_BYTES", 100)
    with pytest.raises(PlanFormatError, match="larger than the 100 that are read"):
        Plan.from_json(make_plan().to_json())


def test_an_order_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxckpt.core.plans._MOST_STEPS", 9)
    with pytest.raises(PlanFormatError, match="a list of at most 9"):
        Plan.from_json(make_plan().to_json())


@pytest.mark.works("errors")
def test_reading_a_plan_runs_nothing_of_the_file() -> None:
    data = json.loads(make_plan().to_json())
    data["__class__"] = data["graph"]["__reduce__"] = "os.system"
    assert Plan.from_json(json.dumps(data)) == make_plan()


# Fuzz: any one place of a sound file is replaced by anything. Either the file is refused with a PlanFormatError, or
# what is read is a plan that can be simulated, printed and written again.

Path = tuple[str | int, ...]


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all parts of a JSON value; of long lists the first and the last items."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[index], (*path, index))


PLACES = sorted(set(places(json.loads(make_plan().to_json()))) - {()}, key=str)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    1.0,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    10**12,
    2**63,
    10**400,
    "",
    "x",
    "\ud800",
    [],
    [0],
    [0, 0],
    [[]],
    [1.0],
    [True],
    [-1],
    [10**30],
    ["x"],
    [None],
    {},
    {"a": 1},
)


def damage(path: Path, value: Any) -> str:
    data = json.loads(make_plan().to_json())
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return json.dumps(data)


def read_or_refuse(text: str) -> None:
    try:
        plan = Plan.from_json(text)
    except PlanFormatError:
        return
    timeline = simulate(plan.graph, plan.schedule)
    assert plan.predicted == Figures.of(timeline) or timeline.step_us != timeline.step_us
    assert plan.predicted.peak_bytes >= plan.graph.static_bytes >= 0
    assert repr(plan)
    assert Plan.from_json(plan.to_json()).schedule == plan.schedule


@pytest.mark.parametrize("path", PLACES, ids=lambda path: "/".join(map(str, path)))
def test_one_damaged_place_is_refused_or_harmless(path: Path) -> None:
    for value in VALUES:
        read_or_refuse(damage(path, value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PLACES), json_values)
@example(("graph", "ops", "time_us", 0), "5")
@example(("graph", "storages", "size_bytes", 0), 2**63)
@pytest.mark.works("errors", "damaged and hostile plan files are refused or harmless")
def test_any_damage_is_refused_or_harmless(path: Path, value: Any) -> None:
    read_or_refuse(damage(path, value))
