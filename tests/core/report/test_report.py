"""The text of a plan: golden files on small graphs made by hand, and properties on any graph.

After a wanted change of the text: `pytest tests/core/report/test_report.py --update-golden`, then read the difference.
"""

from __future__ import annotations

import doctest
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.core.decisions import Decision, decisions
from fxckpt.core.graph import Graph, Op, Storage, StorageKind
from fxckpt.core.plans import Plan
from fxckpt.core.report import rows
from fxckpt.core.report.table import WIDTH, plan_text
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from tests.support import strategies

MIB = 2**20


LINES = {"up": 10, "act": 11, "down": 12, "reduce": 13}


class Step:
    """Builds a graph op by op."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.ops: list[Op] = []

    def storage(self, name: str, size_bytes: int, kind: StorageKind) -> int:
        self.storages.append(Storage(name, size_bytes, kind))
        return len(self.storages) - 1

    def op(
        self,
        name: str,
        target: str,
        reads: tuple[int, ...],
        size_bytes: int,
        time_us: float,
        *,
        kind: StorageKind = "activation",
        module: str = "",
        line: int = 40,
        pinned: str = "",
    ) -> int:
        result = self.storage(name, size_bytes, kind)
        source = f"model.py:{line}"
        self.ops.append(
            Op(name, target, reads, (result,), time_us=time_us, module=module, source=source, pinned=pinned)
        )
        return result


def blocks(count: int) -> Graph:
    """Blocks of a matrix product, a GELU, a matrix product and a communication that must not be repeated; a loss."""
    step = Step()
    x = step.storage("x", MIB, "input")
    up = [step.storage(f"up{i}", 2 * MIB, "parameter") for i in range(count)]
    down = [step.storage(f"down{i}", 2 * MIB, "parameter") for i in range(count)]
    inputs, hidden, active = [], [], []
    for i in range(count):
        place: list[dict[str, Any]] = [{"module": f"blocks.{i}.{n}", "line": line} for n, line in LINES.items()]
        inputs.append(x)
        h = step.op(f"up_mm_{i}", "aten.mm.default", (x, up[i]), 4 * MIB, 5e4, **place[0])
        g = step.op(f"gelu_{i}", "aten.gelu.default", (h,), 4 * MIB, 900.0, **place[1])
        y = step.op(f"down_mm_{i}", "aten.mm.default", (g, down[i]), MIB, 5e4, **place[2])
        x = step.op(f"reduce_{i}", "comm.all_reduce.default", (y,), MIB, 10.0, pinned="it communicates", **place[3])
        hidden.append(h)
        active.append(g)
    loss = step.op("mean", "aten.mean.default", (x,), 4, 300.0)
    forward_count = len(step.ops)
    d, gradients = step.storage("d_loss", 4, "tangent"), []
    for i in reversed(range(count)):
        back: dict[str, Any] = {"kind": "backward", "module": f"blocks.{i}.down", "line": 12}
        d_g = step.op(f"d_gelu_{i}", "aten.mm.default", (d, down[i]), 4 * MIB, 5e4, **back)
        gradients.append(step.op(f"d_down_{i}", "aten.mm.default", (d, active[i]), 2 * MIB, 5e4, **back))
        back |= {"module": f"blocks.{i}.act", "line": 11}
        d_h = step.op(f"d_up_mm_{i}", "aten.gelu_backward.default", (d_g, hidden[i]), 4 * MIB, 1500.0, **back)
        back |= {"module": f"blocks.{i}.up", "line": 10}
        gradients.append(step.op(f"d_up_{i}", "aten.mm.default", (d_h, inputs[i]), 2 * MIB, 5e4, **back))
        d = step.op(f"d_x_{i}", "aten.mm.default", (d_h, up[i]), MIB, 5e4, **back)
    return Graph(
        ops=tuple(step.ops),
        storages=tuple(step.storages),
        forward_count=forward_count,
        outputs=(loss,),
        gradients=tuple(gradients),
        allocated_gradient_bytes=4 * MIB * count,
    )


def remake(graph: Graph, names: Mapping[str, tuple[str, ...]]) -> Schedule:
    """The plain schedule with ops repeated: `names` maps an op to those that run again just before it."""
    index = {op.name: i for i, op in enumerate(graph.ops)}
    order: list[int] = []
    for i, op in enumerate(graph.ops):
        order += [*(index[name] for name in names.get(op.name, ())), i]
    return Schedule(tuple(order), graph.forward_count)


def checkpointed(count: int = 6) -> Plan:
    """All GELUs are remade, and the first two blocks' products with them."""
    graph = blocks(count)
    again = {f"d_down_{i}": (f"up_mm_{i}", f"gelu_{i}") if i < 2 else (f"gelu_{i}",) for i in range(count)}
    return Plan(graph, remake(graph, again), "dp", "estimate", 64 * MIB)


def untouched() -> Plan:
    graph = blocks(2)
    return Plan(
        replace(graph, gradients_allocated=True, reserved_bytes=MIB), plain(graph), "save_all", "reference", 2**30
    )


@dataclass(frozen=True)
class Figures:
    peak_bytes: int = 60 * MIB + 300_000
    step_us: float = 1.9e6


GOLDEN: dict[str, Callable[[], str]] = {
    "report_short": lambda: plan_text(checkpointed()),
    "report_all": lambda: plan_text(checkpointed(), all=True),
    "report_measured": lambda: plan_text(checkpointed(), measurement=Figures()),
    "report_nothing_repeated": lambda: plan_text(untouched()),
    "report_empty": lambda: plan_text(Plan(Graph((), (), 0), Schedule((), 0), "save_all", "estimate", 1)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_text_is_the_golden_one(name: str, golden: Callable[[str, str], None]) -> None:
    golden(name, GOLDEN[name]())


@pytest.mark.parametrize("name", GOLDEN)
def test_lines_fit_a_wide_terminal(name: str) -> None:
    assert max(len(line) for line in GOLDEN[name]().splitlines()) <= WIDTH


def test_long_names_are_cut_and_lines_still_fit() -> None:
    step = Step()
    x = step.storage("x", 8, "parameter")
    for i in range(3):
        place: dict[str, Any] = {"module": f"{'outer.' * 9}end{i}", "line": 10**30}
        x = step.op(f"op{i}", "aten." + "long_name" * 9 + ".default", (x,), 1000, 1.0, pinned="because " * 9, **place)
    step.op("b", "aten.relu.default", (x,), 8, 1.0, kind="backward")
    plan = Plan(Graph(tuple(step.ops), tuple(step.storages), 3), Schedule((0, 1, 2, 3), 3), "hand", "hand", 1)
    table = plan_text(plan).split("What forward computes")[1]
    assert max(len(line) for line in table.splitlines()) == WIDTH
    assert "end2" in table
    assert "pinned: because" in table


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(rows)
    assert result.attempted > 0
    assert result.failed == 0


def decided_in(graph: Graph, schedule: Schedule) -> dict[int, Decision]:
    return decisions(simulate(graph, schedule), simulate(graph, plain(graph)))


@given(st.data())
@settings(max_examples=200)
def test_decisions_say_what_the_schedule_does(data: st.DataObject) -> None:
    graph = data.draw(strategies.graphs())
    plan = Plan(graph, data.draw(strategies.schedules(graph)), "drawn", "drawn", 1)
    decided = decided_in(graph, plan.schedule)
    assert set(decided) == {s for op in graph.ops[: graph.forward_count] for s in op.writes}
    stays = set(plan.timeline.saved) | set(graph.outputs)
    read_again = {x.storage for x in plan.timeline.lifetimes if x.recomputed and x.dies > x.born}
    for storage, decision in decided.items():
        assert (decision.action == "keep") == (storage in stays)
        assert (decision.action == "recompute") == (storage in read_again - stays)
        assert decision.runs == plan.schedule.order.count(graph.producer[storage])
        assert decision.reason


@given(st.data())
@settings(max_examples=100)
def test_text_is_the_same_for_equal_plans_and_rows_lose_nothing(data: st.DataObject) -> None:
    graph = data.draw(strategies.graphs())
    plan = Plan(graph, data.draw(strategies.schedules(graph)), "drawn", "drawn", 1)
    again = Plan.from_json(plan.to_json())
    for everything in (False, True):
        assert plan_text(plan, all=everything) == plan_text(again, all=everything)
        shown = rows.rows(plan, fold=not everything)
        assert sorted(i for row in shown for i in row.ops) == list(range(graph.forward_count))
        assert sum(row.size_bytes for row in shown) == graph.bytes_of(decided_in(graph, plan.schedule))


def test_a_checkpoint_and_the_steps_from_it_are_called_so() -> None:
    """x -> a -> b -> c, and backward reads c: first c is remade from b, then from a by way of b."""
    step = Step()
    x = step.storage("x", 8, "parameter")
    a = step.op("a", "aten.a", (x,), 8, 9.0)
    b = step.op("b", "aten.b", (a,), 8, 1.0)
    c = step.op("c", "aten.c", (b,), 8, 1.0)
    grad = step.op("d", "aten.d", (c,), 8, 1.0, kind="backward")
    graph = Graph(tuple(step.ops), tuple(step.storages), 3, gradients=(grad,))
    from_b = decided_in(graph, Schedule((0, 1, 2, 2, 3), 3))
    assert [from_b[s].action for s in (a, b, c)] == ["discard", "keep", "recompute"]
    assert from_b[b].cause == "checkpoint"
    from_a = decided_in(graph, Schedule((0, 1, 2, 1, 2, 3), 3))
    assert [from_a[s].cause for s in (a, b, c)] == ["checkpoint", "step", "cheap"]


def test_a_tensor_whose_remaking_needs_a_pinned_op_is_called_pinned() -> None:
    step = Step()
    x = step.storage("x", 8, "parameter")
    a = step.op("a", "aten.a", (x,), 8, 1.0, pinned="it has effects")
    b = step.op("b", "aten.b", (a,), 8, 1.0)
    grad = step.op("d", "aten.d", (b,), 8, 1.0, kind="backward")
    graph = Graph(tuple(step.ops), tuple(step.storages), 2, gradients=(grad,))
    assert decided_in(graph, plain(graph))[b].reason == "pinned: needs a: it has effects"


def test_sources_never_show_where_libraries_or_homes_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert rows.source_text(f"{tmp_path}/models/gpt.py:7") == os.path.join("models", "gpt.py:7")
    assert rows.source_text(f"{tmp_path}/venv/site-packages/lib/bert.py:7") == "bert.py:7"
    assert rows.source_text("/elsewhere/gpt.py:7") == "gpt.py:7"
    assert rows.source_text("") == "-"


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([""], "(model)"),
        (["head"], "head"),
        (["h.0", "h.1", "h.3", "h.10"], "h.{0-1,3,10} ×4"),
        (["stage.1.0.conv", "stage.2.0.conv"], "stage.{1-2}.0.conv ×2"),
    ],
)
def test_module_text(modules: list[str], text: str) -> None:
    assert rows.module_text(modules) == text


def test_the_short_table_says_how_much_it_leaves_out() -> None:
    step = Step()
    x = step.storage("x", 8, "input")
    for i in range(40):
        x = step.op(f"op{i}", "aten.relu.default", (x,), 8 + i, 1.0, module=f"layer_{i}", line=i)
    plan = Plan(Graph(tuple(step.ops), tuple(step.storages), 40), Schedule(tuple(range(40)), 40), "hand", "hand", 1)
    assert "30 of 40 rows" in plan_text(plan)
    assert "layer_0 " not in plan_text(plan)
    assert "layer_0 " in plan_text(plan, all=True)
