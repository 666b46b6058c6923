"""The whole curve: for one step, what each amount of memory costs in time, from the floor to the plain model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fxckpt.core.graph import Graph
from fxckpt.core.plans import Plan
from fxckpt.core.report.plot import plot_curve
from fxckpt.core.schedule import plain
from fxckpt.core.simulate import Figures, Timeline, simulate
from fxckpt.core.solvers import Solver, check_options, look_up, lowest, solve
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.units import format_bytes, format_us, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BUDGETS = 16
_SHOWN = 20


@dataclass(frozen=True)
class Pareto:
    """Plans of one step from the lowest peak to the plain model, each of a higher peak and faster than the one before.

    Attributes:
        timelines: what the plans run, simulated, from the lowest peak on.
        solver: name of the solver that found them.
        cost_model: name of the cost model behind all times.
        baseline_timeline: the plain step, simulated.
    """

    timelines: tuple[Timeline, ...]
    solver: str
    cost_model: str
    baseline_timeline: Timeline

    @classmethod
    def of(cls, graph: Graph, solver: str | Solver = "auto", *, cost_model: str = "", **options: Any) -> Pareto:
        """The curve of a graph.

        A solver that has a frontier (auto and dp do) gives it from one set of tables. Any other is asked for its lowest
        peak, and then for budgets evenly between that and the plain peak.

        Raises:
            SolverError: there is no such solver, or it has no such option.
        """
        check_options(solver, options)
        name, method = look_up(solver)
        nothing = simulate(graph, plain(graph))
        if method.frontier is not None:
            return cls(tuple(method.frontier.function(graph, **options)), method.frontier.solver, cost_model, nothing)
        floor = lowest(graph, solver, **options).timeline
        between = _one_by_one(graph, solver, options, floor.peak_bytes, nothing.peak_bytes)
        return cls(tuple(_each_faster((nothing, floor, *between))), name, cost_model, nothing)

    @property
    def graph(self) -> Graph:
        """The captured step."""
        return self.baseline_timeline.graph

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The plans, each for a budget of just its peak."""
        return tuple(
            Plan.of(
                timeline,
                solver=self.solver,
                cost_model=self.cost_model,
                budget_bytes=timeline.peak_bytes,
                baseline=self.baseline_timeline,
            )
            for timeline in self.timelines
        )

    @cached_property
    def points(self) -> tuple[Figures, ...]:
        """What the plans are predicted to cost."""
        return tuple(map(Figures.of, self.timelines))

    @cached_property
    def baseline(self) -> Figures:
        """What the plain model costs."""
        return Figures.of(self.baseline_timeline)

    @property
    def floor(self) -> Plan:
        """The plan of the lowest peak."""
        return self.plans[0]

    def budget_bytes(self, budget: str | int | float) -> int:
        """What a budget means here: a size, bytes, or a fraction of the plain peak without what libraries keep [B].

        Raises:
            BudgetError: the budget makes no sense.
        """
        return within(budget, self.baseline.peak_bytes, self.graph.library_bytes)

    def at(self, budget: str | int | float) -> Plan:
        """The fastest of the plans that fits a budget: a size, bytes, or a fraction of the plain peak.

        Raises:
            BudgetError: the budget makes no sense.
            InfeasibleBudgetError: it is below the floor.
        """
        budget_bytes = self.budget_bytes(budget)
        fitting = [plan for plan in self.plans if plan.predicted.peak_bytes <= budget_bytes]
        if not fitting:
            floor_bytes = self.points[0].peak_bytes
            raise InfeasibleBudgetError(
                f"the curve begins at {format_bytes(floor_bytes)} ({floor_bytes} bytes), over the budget of "
                f"{format_bytes(budget_bytes)}",
                budget_bytes=budget_bytes,
                floor_bytes=floor_bytes,
            )
        return fitting[-1]

    def knee(self) -> Plan:
        """The plan beyond which less memory gets dear.

        It is the one farthest below the straight line from the floor to the plain model, peak and time both scaled to
        their range (Satopää et al., 2011, "Finding a kneedle in a haystack").
        """
        first, last = self.points[0], self.points[-1]
        bytes_range = max(last.peak_bytes - first.peak_bytes, 1)
        us_range = max(first.step_us - last.step_us, 1e-12)

        def below_the_line(plan: Plan) -> float:
            more_bytes = plan.predicted.peak_bytes - first.peak_bytes
            more_us = plan.predicted.step_us - last.step_us
            return 1 - more_bytes / bytes_range - more_us / us_range

        return max(self.plans, key=below_the_line)

    def to_json(self) -> str:
        """The curve's figures as JSON: bytes and microseconds; the plans have a `to_json` of their own."""
        return json.dumps(
            {
                "fxckpt_pareto": 1,
                "fingerprint": self.graph.fingerprint,
                "solver": self.solver,
                "cost_model": self.cost_model,
                "baseline": asdict(self.baseline),
                "points": [asdict(point) for point in self.points],
            }
        )

    def plot(
        self,
        *,
        budget: str | int | float | None = None,
        measured: Sequence[tuple[int, float]] = (),
        peers: Mapping[str, Sequence[tuple[int, float]]] = {},
    ) -> tuple[Figure, Axes]:
        """The curve as a picture; see `fxckpt.core.report.plot.plot_curve`.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        budget_bytes = None if budget is None else self.budget_bytes(budget)
        return plot_curve(
            self.points,
            baseline=self.baseline,
            knee=self.knee().predicted,
            budget_bytes=budget_bytes,
            measured=measured,
            peers=peers,
        )

    def __repr__(self) -> str:
        points = ", ".join(f"({p.peak_bytes}, {p.step_us:.1f})" for p in (self.points[0], self.points[-1]))
        return (
            f"Pareto(solver={self.solver!r}, plans={len(self.timelines)}, from and to (peak_bytes, step_us)={points})"
        )

    def __str__(self) -> str:
        from tabulate import tabulate  # here, so that planning does without it

        knee, baseline = self.knee(), self.baseline
        plans = self.plans[:: -(-len(self.plans) // _SHOWN)]
        shown = sorted({plan.budget_bytes: plan for plan in (*plans, knee, self.plans[-1])}.items())
        rows = [
            [
                format_bytes(figures.peak_bytes),
                f"{figures.peak_bytes / max(baseline.peak_bytes, 1):.1%}",
                format_us(figures.step_us),
                f"{figures.recompute_us / max(baseline.step_us, 1e-12):+.1%}",
                self._name(plan, knee),
            ]
            for _, plan in shown
            for figures in (plan.predicted,)
        ]
        align = ("right", "right", "right", "right", "left")
        headers = ("peak", "of plain", "step", "recomputing", "")
        return tabulate(rows, headers, colalign=align, disable_numparse=True)

    def _name(self, plan: Plan, knee: Plan) -> str:
        is_ = {"floor": plan is self.floor, "knee": plan is knee, "plain": not plan.schedule.repeats()}
        return ", ".join(name for name, true in is_.items() if true)


def _one_by_one(
    graph: Graph, solver: str | Solver, options: dict[str, Any], low_bytes: int, high_bytes: int
) -> Iterator[Timeline]:
    """What a solver finds for some budgets between two."""
    span_bytes = max(high_bytes - low_bytes, 0)
    for budget_bytes in sorted({low_bytes + span_bytes * number // _BUDGETS for number in range(1, _BUDGETS)}):
        yield solve(graph, budget_bytes, solver, **options).timeline


def _each_faster(timelines: Iterable[Timeline]) -> list[Timeline]:
    """Those that are faster than all of a lower peak, from the lowest peak on."""
    best: list[Timeline] = []
    for timeline in sorted(timelines, key=lambda timeline: (timeline.peak_bytes, timeline.step_us)):
        if not best or timeline.step_us < best[-1].step_us:
            best.append(timeline)
    return best
