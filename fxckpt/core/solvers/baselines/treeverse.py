"""Binomial checkpointing: the least recomputation for a chain of equal steps and so many checkpoints.

Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic differentiation" (1992),
and Griewank & Walther, "Algorithm 799: revolve" (2000). A chain of l steps with s checkpoints, the initial state
included, is run back with t(l, s) = r·l - C(s + r, s + 1) forward steps besides the l in which a step is followed by
its own backward, where r is the least number with l <= C(s + r, s).

Real segments are not equal, and their backward reads more than their input, so this solver is a reference point and
not the default: `dp` covers all its schedules.
"""

from __future__ import annotations

from math import comb

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.keep import cheapest_fitting, closure, recomputing
from fxckpt.core.solvers.segments import Segments, cut

_LONGEST_OPS = 32
_MOST_CHECKPOINTS = 64


def treeverse(graph: Graph, budget_bytes: int, *, checkpoints: int | None = None) -> Schedule:
    """The fastest that fits of the binomial schedules over the graph's segments, or the one of lowest peak.

    Args:
        graph: the training step.
        budget_bytes: bound on the peak [B].
        checkpoints: how many boundaries may be kept at a time, the input included; None tries all numbers.
    """
    segments = cut(graph, longest_ops=_LONGEST_OPS)
    most = min(max(len(segments), 1), _MOST_CHECKPOINTS)
    numbers = range(1, most + 1) if checkpoints is None else [max(checkpoints, 1)]
    return cheapest_fitting(graph, (_Reversal(graph, segments).run(n) for n in numbers), budget_bytes)


def forward_steps(steps: int, checkpoints: int) -> int:
    """Forward steps that are repeated to run a chain back, by the closed form.

    >>> [forward_steps(10, s) for s in (1, 2, 3, 10)]
    [45, 20, 15, 9]
    """
    repetitions = 0
    while comb(checkpoints + repetitions, checkpoints) < steps:
        repetitions += 1
    return repetitions * steps - comb(checkpoints + repetitions, checkpoints + 1)


def advance(steps: int, checkpoints: int) -> int:
    """How far to run forward before the next of several checkpoints: the smallest of the best distances."""

    def total(distance: int) -> int:
        rest = forward_steps(steps - distance, checkpoints - 1)
        return distance + rest + forward_steps(distance, checkpoints)

    return min(range(1, steps), key=total)


class _Reversal:
    """Emits the ops of one schedule; `live` is what a repeat can start from."""

    def __init__(self, graph: Graph, segments: Segments) -> None:
        self.graph = graph
        self.segments = segments
        self.order = list(range(graph.forward_count))
        self.always = {*segments.pinned, *graph.outputs}
        self.live = set(self.always)

    def run(self, checkpoints: int) -> Schedule:
        """The schedule with so many checkpoints."""
        self._reverse(0, len(self.segments), checkpoints, fresh=True)
        return Schedule(tuple(self.order), self.graph.forward_count)

    def _reverse(self, low: int, high: int, checkpoints: int, *, fresh: bool) -> None:
        """Run the backward of segments low..high-1; `fresh` if forward has just run through all of them."""
        if high - low == 1:
            self._backward(low, fresh)
        elif checkpoints == 1:
            for segment in range(high - 1, low - 1, -1):
                ready = fresh and segment == high - 1
                self._forward(segment, ready)
                self._backward(segment, ready)
                self._drop(segment, low)
        elif high > low:
            middle = low + advance(high - low, checkpoints)
            self._forward(middle, fresh)
            self._reverse(middle, high, checkpoints - 1, fresh=fresh)
            self._drop(middle, low)
            self._reverse(low, middle, checkpoints, fresh=False)

    def _forward(self, segment: int, fresh: bool) -> None:
        """Have what crosses into a segment."""
        boundary = self.segments.boundaries[segment]
        if not fresh:
            self.order += closure(self.graph, boundary, self.live)
        self.live.update(boundary)

    def _backward(self, segment: int, fresh: bool) -> None:
        cuts, back = self.segments.forward_cuts, self.segments.backward_cuts
        written = {s for op in self.graph.ops[cuts[segment] : cuts[segment + 1]] for s in op.writes}
        live = self.live | written if fresh else self.live
        self.order += recomputing(self.graph, range(back[segment + 1], back[segment]), live)

    def _drop(self, segment: int, low: int) -> None:
        """Forget what crosses into a segment, unless it is needed still: always, or where `low` begins."""
        self.live -= {*self.segments.boundaries[segment]} - self.always - {*self.segments.boundaries[low]}
