"""A plan: a graph, the schedule chosen for it, and what that is predicted to cost. Frozen, and JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from fxckpt.core.graph import Graph
from fxckpt.core.replay import Blocks
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import Figures, Timeline, simulate
from fxckpt.errors import InvalidScheduleError, PlanFormatError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMAT, _READABLE = 2, (1, 2)
_LARGEST_BYTES = 512 * 2**20
_MOST_STEPS = 10_000_000


@dataclass(frozen=True)
class Plan:
    """What to run, and what it is predicted to cost.

    Attributes:
        graph: the captured step.
        schedule: the order in which its ops run, with repeats.
        solver: name of the solver that found it.
        cost_model: name of the cost model behind all times.
        budget_bytes: the budget that it had to fit [B].
        blocks: what it takes by the rule of the device's caching allocator, if it is planned for one. Not in files: it
            depends on how the allocator is set.
    """

    graph: Graph
    schedule: Schedule
    solver: str
    cost_model: str
    budget_bytes: int
    blocks: Blocks | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        timeline: Timeline,
        *,
        solver: str,
        cost_model: str,
        budget_bytes: int,
        baseline: Timeline | None = None,
        blocks: Blocks | None = None,
    ) -> Plan:
        """The plan to run what has been simulated already, and so need not be again.

        Args:
            timeline: the step, as a solver's `Solution` has it.
            solver, cost_model, budget_bytes, blocks: as for `Plan`.
            baseline: the simulated plain step, where that is known too.
        """
        plan = cls(timeline.graph, timeline.schedule, solver, cost_model, budget_bytes, blocks)
        known = {"timeline": timeline, "baseline_timeline": baseline}
        plan.__dict__.update({name: value for name, value in known.items() if value is not None})
        return plan

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated step."""
        return simulate(self.graph, self.schedule)

    @cached_property
    def baseline_timeline(self) -> Timeline:
        """The simulated step of the plain model: every op once, everything saved that backward reads."""
        return simulate(self.graph, plain(self.graph))

    @cached_property
    def predicted(self) -> Figures:
        """Cost of this plan."""
        return Figures.of(self.timeline)

    @cached_property
    def baseline(self) -> Figures:
        """Cost of the plain model."""
        return Figures.of(self.baseline_timeline)

    @property
    def peak_bytes(self) -> int:
        """The peak that a budget bounds: in blocks, where it is planned for a caching allocator [B]."""
        return self.predicted.peak_bytes if self.blocks is None else self.blocks.plan.allocated_bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the graph: a plan applies to graphs that have the same."""
        return self.graph.fingerprint

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it back."""
        return json.dumps(
            {
                "fxckpt_plan": _FORMAT,
                "fingerprint": self.fingerprint,
                "solver": self.solver,
                "cost_model": self.cost_model,
                "budget_bytes": self.budget_bytes,
                "predicted": asdict(self.predicted),
                "baseline": asdict(self.baseline),
                "forward_steps": self.schedule.forward_steps,
                "order": self.schedule.order,
                "graph": self.graph.to_dict(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote, now or in an earlier format. Figures are computed anew, never taken from it.

        Raises:
            PlanFormatError: not JSON, not a plan, too large, damaged, or a schedule that its graph does not allow.
        """
        if len(text) > _LARGEST_BYTES:
            raise PlanFormatError(f"a plan of {len(text)} characters is larger than the {_LARGEST_BYTES} that are read")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanFormatError(f"this is not JSON: {error}") from error
        if not isinstance(data, Mapping) or "fxckpt_plan" not in data:
            raise PlanFormatError("this is not a plan written by fxckpt")
        if type(data["fxckpt_plan"]) is not int or data["fxckpt_plan"] not in _READABLE:
            raise PlanFormatError(f"the plan's format is {data['fxckpt_plan']!r}; up to {_FORMAT} can be read here")
        try:
            plan = cls(
                graph=Graph.from_dict(data["graph"]),
                schedule=_schedule(data),
                solver=_text(data["solver"]),
                cost_model=_text(data["cost_model"]),
                budget_bytes=_count(data["budget_bytes"]),
            )
            _ = plan.timeline  # its schedule is checked here, not when somebody first looks
        except KeyError as error:
            raise PlanFormatError(f"the plan has no {error}") from error
        except InvalidScheduleError as error:
            raise PlanFormatError(f"the plan's schedule does not fit its graph: {error}") from error
        if plan.fingerprint != data.get("fingerprint"):
            raise PlanFormatError("the plan's graph and its fingerprint differ: the file was changed")
        return plan

    def plot_timeline(self, *, axis: Literal["time", "steps"] = "time") -> tuple[Figure, Axes]:
        """Memory over the step as a figure and its axes: see `report.plot.plot_timeline`.

        Raises:
            MissingExtraError: matplotlib is not installed.
            FxckptError: there is no such axis, or the plan has no ops.
        """
        from fxckpt.core.report.plot import plot_timeline

        return plot_timeline(self, axis=axis)

    def save_html(self, file: str | PathLike[str]) -> None:
        """Write the plan as one page that needs no network: the timeline to point at, and the table of tensors.

        Raises:
            FxckptError: the file can't be written, or the plan has no ops.
        """
        from fxckpt.core.report.page import save_page

        save_page(self, file)

    def animate(self, file: str | PathLike[str], *, progress: bool = True) -> None:
        """Write a film of a step as a GIF, beside the plain model and least memory: see `report.film.animate`.

        Raises:
            MissingExtraError: matplotlib is not installed.
            FxckptError: the file's name does not end in ".gif" or it can't be written, or the plan has no ops.
        """
        from fxckpt.core.report.film import animate

        animate(self, file, progress=progress)

    def __repr__(self) -> str:
        return (
            f"Plan(solver={self.solver!r}, budget_bytes={self.budget_bytes}, "
            f"peak_bytes={self.predicted.peak_bytes}, baseline_peak_bytes={self.baseline.peak_bytes}, "
            f"repeats={sum(self.schedule.repeats().values())}, fingerprint={self.fingerprint!r})"
        )


def _schedule(data: Mapping[str, Any]) -> Schedule:
    order = data["order"]
    if not isinstance(order, list) or len(order) > _MOST_STEPS:
        raise PlanFormatError(f"the plan's order must be a list of at most {_MOST_STEPS} op numbers")
    return Schedule(tuple(_count(op) for op in order), _count(data["forward_steps"]))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanFormatError(f"the plan has {value!r} where a number of bytes, steps or ops belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PlanFormatError(f"the plan has {value!r} where a name belongs")
    return value
