"""Dynamic programming over segments, with choices a segment and recomputation within recomputation.

The step is cut into segments (`fxckpt.solvers.segments`); for each block of neighbouring ones a minimum cut says what
is worth keeping at which price (`fxckpt.solvers.blocks`); the chain's tables say how to combine them in every budget
(`fxckpt.solvers.chain`). Figures in the tables guide the search only: schedules are simulated, and the fastest whose
simulated peak fits is taken (`fxckpt.solvers.curve`). A local search then removes what thinking in segments leaves
(`fxckpt.solvers.polish`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fxckpt.graph import Graph
from fxckpt.schedule import Schedule, plain
from fxckpt.simulate import Timeline, simulate
from fxckpt.solvers.backward_order import Reordered, reordered
from fxckpt.solvers.curve import Curve, Fineness, Prices
from fxckpt.solvers.keep import fastest_fitting
from fxckpt.solvers.polish import polish
from fxckpt.solvers.segments import Segments, cut

Effort = Literal["fast", "default", "max"]


@dataclass(frozen=True)
class Level:
    """How much work to do.

    Attributes:
        longest_ops: segments longer than this have their long-lived storages pinned; for each entry the step is cut
            anew.
        most_segments: neighbours are merged until there are no more.
        fineness: how finely each cutting is looked at.
    """

    longest_ops: tuple[int, ...]
    most_segments: int
    fineness: Fineness


LEVELS: dict[Effort, Level] = {
    "fast": Level((32,), 48, Fineness(merged=3, choices=8, slots=1500)),
    "default": Level((32,), 80, Fineness(merged=4, choices=16, slots=4000)),
    "max": Level((48, 32, 16), 128, Fineness(merged=5, choices=32, slots=8000)),
}


def dp(graph: Graph, budget_bytes: int, *, effort: Effort = "default") -> Schedule:
    """The fastest schedule found that fits, or the one of lowest peak if none does.

    Args:
        graph: the training step.
        budget_bytes: bound on the peak [B].
        effort: "fast", "default" or "max": how many ways to cut the step, how fine the tables, how long the local
            search.
    """
    unchanged = simulate(graph, plain(graph))
    if unchanged.peak_bytes <= budget_bytes:
        return unchanged.schedule
    starts: list[Timeline] = []
    lowest: list[Timeline] = [unchanged]
    for curve, order in _curves(graph, effort):
        for found, into in ((curve.fastest(budget_bytes), starts), (curve.lowest(), lowest)):
            into += [simulate(graph, order.restored(found.schedule))] if found else []
    if not starts:
        floor = _floor(graph, lowest, effort)
        if floor.peak_bytes > budget_bytes:
            return floor.schedule
        starts = [floor]
    best = fastest_fitting(starts, budget_bytes)
    return polish(graph, best.schedule, budget_bytes, effort=effort)


def _floor(graph: Graph, lowest: list[Timeline], effort: Effort) -> Timeline:
    """The lowest peak that the local search reaches from the lowest of each curve; the same whatever the budget."""
    found = [simulate(graph, polish(graph, timeline.schedule, 0, effort="fast")) for timeline in lowest]
    best = fastest_fitting([*lowest, *found], 0)
    return best if effort == "fast" else simulate(graph, polish(graph, best.schedule, 0, effort=effort))


def frontier(graph: Graph, *, effort: Effort = "default") -> list[Schedule]:
    """Schedules from the lowest peak to the plain step, each faster than the one before: the whole curve at once."""
    found = [simulate(graph, plain(graph))]
    for curve, order in _curves(graph, effort):
        found += [simulate(graph, order.restored(t.schedule)) for t in curve.timelines()]
    found.sort(key=lambda t: (t.peak_bytes, t.step_us))
    best: list[Timeline] = []
    for timeline in found:
        if not best or timeline.step_us < best[-1].step_us:
            best.append(timeline)
    return [timeline.schedule for timeline in best]


def _curves(graph: Graph, effort: Effort) -> Iterator[tuple[Curve, Reordered]]:
    """A curve for each cutting of the step, with backward as it stands and in a better order; and that order."""
    level = LEVELS[effort]
    prices: Prices = {}
    most_bytes = simulate(graph, plain(graph)).peak_bytes
    for other in _orders(graph):
        for segments in _cuttings(other, level):
            yield Curve(other.graph, segments, most_bytes, fineness=level.fineness, prices=prices), other


def _orders(graph: Graph) -> Iterator[Reordered]:
    unchanged = Reordered(graph, tuple(range(len(graph.ops))))
    yield from dict.fromkeys((unchanged, reordered(graph)))


def _cuttings(other: Reordered, level: Level) -> Iterable[Segments]:
    return dict.fromkeys(
        cut(other.graph, finer=finer, longest_ops=longest, most_segments=level.most_segments, pinned=pinned)
        for longest in level.longest_ops
        for pinned in (other.held, frozenset[int]())
        for finer in (False, True)
    )
