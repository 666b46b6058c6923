"""A plan as text: what it costs, what fills the memory at the peak, and what happens to each tensor, and why."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any, Protocol

from fxckpt.core.graph import Graph
from fxckpt.core.outside import between_bytes, loss_bytes
from fxckpt.core.report import rows
from fxckpt.core.report.planned import Planned
from fxckpt.core.report.prose import closing_text
from fxckpt.core.simulate import PEAK_KINDS, Timeline, simulate
from fxckpt.units import format_bytes, format_us

SHORT_ROWS = 30
"""Rows of the table of tensors unless all are asked for."""

WIDTH = 140
"""Characters in the longest line."""

_LINE = 110
"""Characters in a line of prose."""

COLUMNS = ("module", "source", "op", "bytes", "time", "runs", "decision", "reason")
"""Of the table of tensors."""

_NARROWEST = {"op": 12, "reason": 30, "source": 16, "module": 22}
"""Columns that are cut where lines are too long, in this order, and how far."""


class Measured(Protocol):
    """What a measurement says: the highest peak [B] and the time of a step [µs]."""

    @property
    def peak_bytes(self) -> int:
        """Measured peak, everything counted [B]."""

    @property
    def step_us(self) -> float:
        """Measured time of one step [µs]."""


def plan_text(plan: Planned, *, all: bool = False, measurement: Measured | None = None) -> str:  # noqa: A002 (public name)
    """A plan as text, the same for equal plans.

    Args:
        plan: the plan.
        all: every row, each module by itself; else the largest rows, equal modules folded into one.
        measurement: real figures, shown beside the predicted ones.
    """
    parts = [
        _title(plan),
        _figures(plan, measurement),
        _peaks(plan),
        _breakdown(plan),
        _tensors(plan, everything=all),
        fill(closing_text(plan), _LINE),
    ]
    return "\n\n".join(parts) + "\n"


def facts(plan: Planned) -> list[tuple[str, str]]:
    """What kind of plan it is: names and texts."""
    graph = plan.graph
    repeated = plan.schedule.repeats()
    if graph.gradients_allocated:
        gradients = "already allocated (.grad holds tensors before the step: they take memory all the time)"
    else:
        gradients = "fresh (.grad is None before the step: they take memory as backward produces them)"
    return [
        ("solver", f"{plan.solver} (times by cost model {plan.cost_model!r})"),
        ("budget", f"{format_bytes(plan.budget_bytes)}, {_fraction(plan)}"),
        ("gradients", gradients),
        ("graph", f"{graph.forward_count} forward and {graph.plain_count - graph.forward_count} backward ops"),
        ("repeated", f"{len(repeated)} ops, {sum(repeated.values())} runs more than the plain model"),
        *_blocks(plan),
        *_outside(plan),
        ("fingerprint", graph.fingerprint),
    ]


def _blocks(plan: Planned) -> list[tuple[str, str]]:
    """What the device's allocator makes of it."""
    if plan.blocks is None:
        return []
    taken, plain = plan.blocks.plan, plan.blocks.baseline
    text = f"{format_bytes(taken.allocated_bytes)} at the peak by the CUDA caching allocator's rule (plain model: "
    text += f"{format_bytes(plain.allocated_bytes)}), of {format_bytes(taken.reserved_bytes)} that it reserves"
    return [("blocks", text)]


def _outside(plan: Planned) -> list[tuple[str, str]]:
    """What the plan does not see: a loss that is computed outside of the model."""
    taken_bytes = loss_bytes(plan.timeline)
    if not taken_bytes:
        return []
    taken, all_in_all = format_bytes(taken_bytes), format_bytes(between_bytes(plan.timeline))
    return [("outside", f"a loss there is not planned: cross entropy takes up to {taken}, {all_in_all} in all")]


def _title(plan: Planned) -> str:
    found = facts(plan)
    width = max(len(name) for name, _ in found)
    return "\n".join(["fxckpt plan", *(f"  {name:<{width}}  {text}" for name, text in found)])


def _fraction(plan: Planned) -> str:
    peak_bytes = plan.baseline.peak_bytes if plan.blocks is None else plan.blocks.baseline.allocated_bytes
    if plan.budget_bytes > peak_bytes:
        return "more than the plain model's peak"
    kept_bytes = plan.graph.library_bytes
    aside = " (what libraries keep aside)" if kept_bytes else ""
    return f"{(plan.budget_bytes - kept_bytes) / max(peak_bytes - kept_bytes, 1):.1%} of the plain model's peak{aside}"


def figures(plan: Planned) -> tuple[list[str], list[list[str]]]:
    """What a step costs, plain and planned: headers and rows of a table."""
    baseline, predicted = plan.baseline, plan.predicted
    other = "if .grad is None" if plan.graph.gradients_allocated else "if .grad is allocated"
    twin = plan.graph.with_gradients(not plan.graph.gradients_allocated)
    twin_baseline = simulate(twin, plan.baseline_timeline.schedule).peak_bytes
    twin_predicted = simulate(twin, plan.schedule).peak_bytes
    with_recompute_us = baseline.step_us + predicted.recompute_us
    table = [
        _byte_row("peak memory", baseline.peak_bytes, predicted.peak_bytes),
        _byte_row(f"  {other}", twin_baseline, twin_predicted),
        [*_time_row("step time", baseline.step_us, predicted.step_us), _change(baseline.step_us, predicted.step_us)],
        [
            *_time_row("  of it recomputing", baseline.recompute_us, predicted.recompute_us),
            _change(baseline.step_us, with_recompute_us),
        ],
        _byte_row("saved for backward", baseline.saved_bytes, predicted.saved_bytes),
    ]
    return ["one training step", "baseline", "plan", "change"], table


def _figures(plan: Planned, measurement: Measured | None) -> str:
    headers, table = figures(plan)
    if measurement is not None:
        headers.append("measured")
        for row in table:
            row.append("")
        table[0][-1] = format_bytes(measurement.peak_bytes)
        table[2][-1] = format_us(measurement.step_us)
    return _table(table, headers, left=1)


def _byte_row(name: str, baseline: int, plan: int) -> list[str]:
    return [name, format_bytes(baseline), format_bytes(plan), _change(baseline, plan)]


def _time_row(name: str, baseline_us: float, plan_us: float) -> list[str]:
    return [name, format_us(baseline_us), format_us(plan_us)]


def _change(baseline: float, plan: float) -> str:
    if not baseline:
        return "-"
    text = f"{plan / baseline - 1:+.1%}"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text


def _peaks(plan: Planned) -> str:
    lines = ["Where most memory is in use"]
    for name, timeline in (("baseline", plan.baseline_timeline), ("plan", plan.timeline)):
        lines.append(f"  {name:<8}  {_peak(timeline)}")
    return "\n".join(lines)


def _peak(timeline: Timeline) -> str:
    graph, schedule, step = timeline.graph, timeline.schedule, timeline.peak_step
    if step < 0:
        return "there are no ops"
    op = graph.ops[schedule.order[step]]
    split = schedule.forward_steps
    if step < split:
        when = f"forward step {step + 1} of {split}"
    else:
        when = f"backward step {step - split + 1} of {len(schedule) - split}"
    again = ", repeated" if schedule.order.index(schedule.order[step]) < step else ""
    place = f"{op.module or '(model)'}, {rows.source_text(op.source)}"
    return f"{when}: {op.target} ({op.name}{again}) in {place}"


def _breakdown(plan: Planned) -> str:
    baseline, predicted = plan.baseline_timeline.at_peak, plan.timeline.at_peak
    table = [
        [kind, format_bytes(baseline[kind]), format_bytes(predicted[kind])]
        for kind in PEAK_KINDS
        if baseline[kind] or predicted[kind]
    ]
    table.append(["sum", format_bytes(sum(baseline.values())), format_bytes(sum(predicted.values()))])
    return _table(table, ["in use at the peak", "baseline", "plan"], left=1)


def _tensors(plan: Planned, *, everything: bool) -> str:
    graph = plan.graph
    found = rows.rows(plan, fold=not everything)
    shown = found if everything else found[:SHORT_ROWS]
    table = [cells(graph, row) for row in shown]
    title = "What forward computes, by module and source line, largest first (time: of one run)"
    if len(shown) < len(found):
        title += f"; {len(shown)} of {len(found)} rows, all=True or --all shows every one"
    align = ("left", "left", "left", "right", "right", "right", "left", "left")
    text = _tabulated(_fitted(table), COLUMNS, colalign=align if table else None)
    return title + "\n" + text


def cells(graph: Graph, row: rows.Row) -> list[str]:
    """A row of the table of tensors, a text for each of `COLUMNS`."""
    return [
        rows.module_text(row.modules),
        rows.source_text(row.source),
        rows.ops_text(graph, row),
        format_bytes(row.size_bytes),
        format_us(row.time_us),
        rows.runs_text(row),
        rows.decision_text(row),
        rows.reason_text(graph, row),
    ]


def _fitted(table: list[list[str]]) -> list[list[str]]:
    """The table with long places and reasons cut, so that its lines are not longer than WIDTH."""
    if not table:
        return table
    # tabulate leaves two characters beside a header
    widths = [max(len(name) + 2, *map(len, cells)) for name, *cells in zip(COLUMNS, *table, strict=True)]
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    for name, narrowest in _NARROWEST.items():
        column = COLUMNS.index(name)
        cut = min(max(excess, 0), max(widths[column] - narrowest, 0))
        widths[column] -= cut
        excess -= cut
    return [[_cut(text, widths[i], COLUMNS[i]) for i, text in enumerate(row)] for row in table]


def _cut(text: str, width: int, column: str) -> str:
    """Text that fits its column: of places the end is told, of ops and reasons the start."""
    if len(text) <= width:
        return text
    return "…" + text[len(text) - width + 1 :] if column in ("module", "source") else text[: width - 1] + "…"


def _table(table: list[list[str]], headers: list[str], *, left: int) -> str:
    align = ["left" if column < left else "right" for column in range(len(headers))]
    return _tabulated(table, headers, colalign=align, preserve_whitespace=True)


def _tabulated(table: list[list[str]], headers: Sequence[str], **layout: Any) -> str:
    from tabulate import tabulate  # here, so that planning does without it

    return tabulate(table, headers, disable_numparse=True, **layout)
