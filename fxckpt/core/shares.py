"""Several calls in one step, under one budget: how much of it each may take.

A step may call a model more than once before backward starts (siamese networks, pairs of answers, two towers), or call
several models. What a call has saved stays while the calls after it run. Each call can be run in several ways, from
lean to fast; the choice that fits and takes the least time is a shortest path over calls, where a state is how many
bytes the calls so far hold. With calls whose backwards run in the reverse order, as autograd runs them, it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxckpt.core.graph import Graph
from fxckpt.core.simulate import Timeline


@dataclass(frozen=True)
class Offer:
    """One way to run a call.

    Attributes:
        held_bytes: what it adds to the memory in use from the end of its forward to the start of its backward [B].
        peak_bytes: the most that it adds while its forward or its backward runs [B].
        time_us: its time, forward and backward [µs].
    """

    held_bytes: int
    peak_bytes: int
    time_us: float

    @classmethod
    def of(cls, timeline: Timeline) -> Offer:
        """What a simulated step adds to what is there anyway: parameters, buffers, allocated gradients, reserve."""
        graph = timeline.graph
        shared_bytes = resident_bytes(graph)
        inputs_bytes = graph.static_bytes - shared_bytes
        held_bytes = inputs_bytes + graph.own_outputs_bytes + timeline.saved_bytes
        return cls(held_bytes, timeline.peak_bytes - shared_bytes, timeline.step_us)


def resident_bytes(graph: Graph) -> int:
    """What is there whether or not a call runs: parameters, buffers, allocated gradients, reserve [B]."""
    return graph.static_bytes - graph.bytes_of(i for i, s in enumerate(graph.storages) if s.kind == "input")


@dataclass(frozen=True, slots=True)
class _Path:
    """A choice for the calls so far: what they hold [B], their time [µs], and which offers it takes."""

    held_bytes: int
    time_us: float
    chosen: tuple[int, ...]


_MOST_BOUNDS = 24
_MOST_PATHS = 4096
"""More are thinned out: of neighbours that hold nearly the same, the faster stay."""


def share(calls: Sequence[Sequence[Offer]], budgets_bytes: Sequence[int]) -> tuple[int, ...] | None:
    """For each call of a step the offer to take, so that the step fits and takes the least time; None if nothing fits.

    Backwards run in the reverse order of the forwards: while a call runs, forward or backward, all calls before it hold
    what they saved, and none after it does.

    Args:
        calls: the offers of each call, in the order of the forwards.
        budgets_bytes: for each call the bound on what the calls take together while it runs, beside what is there
            anyway [B].
    """
    paths = [_Path(0, 0.0, ())]
    for offers, budget_bytes in zip(calls, budgets_bytes, strict=True):
        further = [
            _Path(path.held_bytes + offer.held_bytes, path.time_us + offer.time_us, (*path.chosen, index))
            for path in paths
            for index, offer in enumerate(offers)
            if path.held_bytes + offer.peak_bytes <= budget_bytes
        ]
        paths = _thinned(_leaner_or_faster(further), _MOST_PATHS)
    return min(paths, key=lambda path: (path.time_us, path.held_bytes)).chosen if paths else None


def share_in_any_order(calls: Sequence[Sequence[Offer]], budget_bytes: int) -> tuple[int, ...] | None:
    """As `share`, where backwards run in whatever order: while a call runs, all others may hold what they saved.

    Then what counts is the sum of what is held, and the most that a running call takes beside what it holds. For each
    bound on the latter (evenly chosen among those that occur, if there are many) the rest is `share` once more.
    """
    extras = sorted({offer.peak_bytes - offer.held_bytes for offers in calls for offer in offers})
    step = max(len(extras) // _MOST_BOUNDS, 1)
    best: tuple[float, tuple[int, ...]] | None = None
    for bound in extras[len(extras) - 1 :: -step]:
        held = [[Offer(o.held_bytes, o.held_bytes, o.time_us) for o in offers] for offers in calls]
        kept = [[i for i, o in enumerate(offers) if o.peak_bytes - o.held_bytes <= bound] for offers in calls]
        offered = [[offers[i] for i in indices] for offers, indices in zip(held, kept, strict=True)]
        chosen = share(offered, [budget_bytes - bound] * len(calls))
        if chosen is not None:
            indices = tuple(places[i] for places, i in zip(kept, chosen, strict=True))
            time_us = sum(offers[i].time_us for offers, i in zip(calls, indices, strict=True))
            best = min(best or (time_us, indices), (time_us, indices))
    return None if best is None else best[1]


def lean(calls: Sequence[Sequence[Offer]]) -> tuple[int, ...]:
    """For each call the offer to take where nothing fits: the step's peak is then as low as these offers allow.

    The peak of a call counts with what those before it hold, so the last call takes its lowest peak, and each call
    before it the offer of which the higher of its own peak and its share in the peak behind it is the lowest.
    """
    chosen: list[int] = []
    behind_bytes = 0  # the peak of all that comes later, beside what this call holds
    for offers in reversed(calls):
        tops = [max(offer.peak_bytes, offer.held_bytes + behind_bytes) for offer in offers]
        best = min(range(len(offers)), key=lambda i: (tops[i], offers[i].time_us, i))
        chosen.append(best)
        behind_bytes = tops[best]
    return tuple(reversed(chosen))


def peak_bytes(calls: Sequence[Sequence[Offer]], chosen: Sequence[int]) -> int:
    """The most that the calls of a step take together, beside what is there anyway [B]."""
    held_bytes = most_bytes = 0
    for offers, index in zip(calls, chosen, strict=True):
        most_bytes = max(most_bytes, held_bytes + offers[index].peak_bytes)
        held_bytes += offers[index].held_bytes
    return max(most_bytes, held_bytes)


def _leaner_or_faster(paths: list[_Path]) -> list[_Path]:
    """Those of which no other holds as little and is as fast; from lean to fast."""
    best: list[_Path] = []
    for path in sorted(paths, key=lambda path: (path.held_bytes, path.time_us, path.chosen)):
        if not best or path.time_us < best[-1].time_us:
            best.append(path)
    return best


def _thinned(paths: list[_Path], most: int) -> list[_Path]:
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
