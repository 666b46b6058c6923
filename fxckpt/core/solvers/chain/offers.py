"""All the schedules that one cutting of the step offers, from the lowest peak to the plain step."""

from __future__ import annotations

from dataclasses import dataclass

from fxckpt.core.graph import Graph
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.core.solvers.chain.blocks import Block, Blocks
from fxckpt.core.solvers.chain.chain import BlockCost, Chain, Link
from fxckpt.core.solvers.chain.lower import lower
from fxckpt.core.solvers.segments import Segments

Prices = dict[object, BlockCost]
"""What blocks cost, by `Block.key`."""

_MOST_WORK = 4_000_000  # ops to simulate along all of one cutting's
_MARGIN = 1.03  # how much the table's peaks may be above the simulated ones


@dataclass(frozen=True)
class Fineness:
    """How finely to look.

    Attributes:
        merged: most segments a block.
        choices: about how many choices a block.
        slots: into how many steps memory is divided.
    """

    merged: int
    choices: int
    slots: int


class Offers:
    """The schedules of one cutting.

    Args:
        graph: the training step.
        segments: the cutting.
        most_bytes: largest peak of interest [B].
        fineness: how finely to look.
        prices: blocks that are known already; blocks priced here are added.
    """

    def __init__(
        self, graph: Graph, segments: Segments, most_bytes: int, *, fineness: Fineness, prices: Prices
    ) -> None:
        self.graph = graph
        self.segments = segments
        count = len(segments)
        blocks = Blocks(graph, segments)
        self._blocks = {
            (first, last): blocks.block(first, last)
            for first in range(count)
            for last in range(first, min(count, first + fineness.merged))
        }
        for block in self._blocks.values():
            if block.key not in prices:
                prices[block.key] = BlockCost(block.choices(fineness.choices), *block.backward_only())
        rest_bytes = blocks.rest_bytes()
        self._base_bytes = graph.static_bytes + blocks.lasting_bytes() + rest_bytes[-1]
        self._chain = Chain(
            _links(graph, segments, [self._blocks[i, i] for i in range(count)], rest_bytes),
            {where: prices[block.key] for where, block in self._blocks.items()},
            most_bytes=most_bytes - self._base_bytes,
            slots=fineness.slots,
        )
        self._points = _thinned(self._chain.points(), fineness.slots * graph.plain_count // _MOST_WORK)
        self._timelines: dict[int, Timeline] = {}

    def timelines(self) -> list[Timeline]:
        """Every schedule, simulated; from low peak to high."""
        return [self._timeline(slot) for slot in self._points]

    def fastest(self, budget_bytes: int) -> Timeline | None:
        """The fastest schedule that fits, None if none does.

        The table's peaks are within some percent of the simulated ones, so only schedules that it takes for a little
        more than the budget or less are tried, the fastest first.
        """
        most = (budget_bytes - self._base_bytes) * _MARGIN / self._chain.slot_bytes
        for slot in reversed(self._points):
            if slot <= most and self._timeline(slot).peak_bytes <= budget_bytes:
                return self._timeline(slot)
        return None

    def lowest(self) -> Timeline | None:
        """The schedule of lowest peak; None if there is none at all."""
        timelines = [self._timeline(slot) for slot in self._points if slot <= self._points[0] * _MARGIN]
        return min(timelines, key=lambda t: (t.peak_bytes, t.step_us), default=None)

    def _timeline(self, slot: int) -> Timeline:
        if slot not in self._timelines:
            schedule = lower(self.graph, self.segments, self._blocks, self._chain.steps(slot))
            self._timelines[slot] = simulate(self.graph, schedule)
        return self._timelines[slot]


def _thinned(points: list[int], least_gap: int) -> list[int]:
    """The points from the last on, none nearer to the one after it than `least_gap`."""
    kept: list[int] = []
    for point in reversed(points):
        if not kept or kept[-1] - point >= least_gap or point == points[0]:
            kept.append(point)
    return kept[::-1]


def _links(graph: Graph, segments: Segments, singles: list[Block], rest_bytes: list[int]) -> tuple[Link, ...]:
    """The segments as the chain sees them."""
    links: list[Link] = []
    kinds: dict[object, int] = {}
    forward: dict[object, tuple[float, int]] = {}
    for index, block in enumerate(singles):
        weight_bytes = rest_bytes[index - 1] - rest_bytes[index] if index else 0
        if block.key not in forward:
            forward[block.key] = block.forward_only()
        time_us, peak_bytes = forward[block.key]
        links.append(
            Link(
                kind=kinds.setdefault((block.key, weight_bytes), len(kinds)),
                boundary_bytes=graph.bytes_of(segments.boundaries[index]),
                inflow_bytes=block.inflow_bytes,
                weight_bytes=weight_bytes,
                forward_us=time_us,
                forward_peak_bytes=peak_bytes,
            )
        )
    return tuple(links)
