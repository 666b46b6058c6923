"""What the views show: all that they ask of a plan. They take what they draw, so they need no more than this."""

from __future__ import annotations

from typing import Protocol

from fxckpt.core.graph import Graph
from fxckpt.core.replay import Blocks
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Figures, Timeline


class Planned(Protocol):
    """A schedule of a graph, where it comes from, and what it costs beside the plain step; a `Plan` is one."""

    @property
    def graph(self) -> Graph:
        """The captured step."""

    @property
    def schedule(self) -> Schedule:
        """The order in which its ops run, with repeats."""

    @property
    def solver(self) -> str:
        """Name of the solver that found it."""

    @property
    def cost_model(self) -> str:
        """Name of the cost model behind all times."""

    @property
    def budget_bytes(self) -> int:
        """The budget that it had to fit [B]."""

    @property
    def blocks(self) -> Blocks | None:
        """What it takes by the rule of the device's caching allocator, if it is planned for one."""

    @property
    def timeline(self) -> Timeline:
        """The simulated step."""

    @property
    def baseline_timeline(self) -> Timeline:
        """The simulated step of the plain model."""

    @property
    def predicted(self) -> Figures:
        """Cost of the step."""

    @property
    def baseline(self) -> Figures:
        """Cost of the plain model's."""
