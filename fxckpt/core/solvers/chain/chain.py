"""The chain problem: which segments to take together, what to keep of each, and when to run forward again.

With segments s … t, a budget m and the input of s there, the least extra time C(s, t, m) is the minimum of

    block   keep choice k of segments s … e, do the rest, come back:
                again[s..e, k] + C(e+1, t, m − kept[s..e, k])
                if m ≥ max(inflow[t] + forward peak[s..e, k], backward peak[s..e, k] + W(e+1, t))
    alone   s … t is one block whose forward has run before: all that its backward needs is made when it is needed
                if m ≥ backward peak
    split   run forward to the boundary before u and keep nothing but that, do u … t, start again from s:
                forward(s … u−1) + C(u, t, m − boundary[u]) + C(s, u−1, m − W(u, t))
                if m ≥ inflow[t] + the forward's own peak

Without choices and blocks of several segments this is the recurrence of Beaumont, Eyraud-Dubois, Herrmann, Joly and
Shilova, "Optimal checkpointing for heterogeneous chains" (2019), hal-02352969; choices a segment are from Zhao et al.,
"Rockmate" (2023), arXiv:2307.01236. m is net of what is there whatever is decided while t runs backward: gradients of
the parameters of later segments, pinned storages of segments up to t, what flows past. W(u, t) is by how much more that
is while u − 1 runs. So C depends only on what kinds of segments stand in a row, and equal rows share one table. A row
that ends the chain runs forward for the first time, which is not extra.

Memory is counted in slots; shifts round to the nearest slot, since every schedule is simulated in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fxckpt.core.solvers.chain.blocks import Choice

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Link:
    """A segment as the chain sees it.

    Attributes:
        kind: equal for segments that are alike.
        boundary_bytes: what crosses the cut before it [B].
        inflow_bytes: gradients that flow into its backward [B].
        weight_bytes: W of this segment: by how much what is there whatever is decided grows from its backward to that
            of the segment before [B].
        forward_us: time of making the next boundary from its input once more [µs].
        forward_peak_bytes: most bytes during that, its input not counted [B].
    """

    kind: int
    boundary_bytes: int
    inflow_bytes: int
    weight_bytes: int
    forward_us: float
    forward_peak_bytes: int


@dataclass(frozen=True)
class BlockCost:
    """A block as the chain sees it: choices, and time [µs] and peak [B] of its backward alone."""

    choices: tuple[Choice, ...]
    alone_us: float
    alone_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Forward:
    """Run segments `first` to `last` forward and keep nothing but the boundary behind them."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Run segments `first` to `last` forward and keep a choice."""

    first: int
    last: int
    choice: Choice


@dataclass(frozen=True, slots=True)
class Backward:
    """Run segments `first` to `last` backward."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Free the boundary before segment `index`."""

    index: int


Step = Forward | Keep | Backward | Drop


class _Move(NamedTuple):
    """One way to start on segments first … last.

    Attributes:
        until: the last segment of the block, or of what runs forward.
        extra_us: its own time [µs].
        least_slot: the least budget that it needs.
        choice: what the block keeps, if it is kept.
        split: whether segments first … until are left to do at the end.
        shift, shift_before: by how many slots the budget is less for segments behind `until`, and for those left.
    """

    until: int
    extra_us: float
    least_slot: int
    choice: Choice | None
    split: bool
    shift: int
    shift_before: int


class Chain:
    """Tables of the recurrence, for all budgets up to `most_bytes` at once.

    Args:
        links: the segments.
        blocks: for (first, last) what that block costs.
        most_bytes: largest budget of interest [B].
        slots: into how many steps it is divided.
    """

    def __init__(
        self, links: tuple[Link, ...], blocks: dict[tuple[int, int], BlockCost], *, most_bytes: int, slots: int
    ) -> None:
        self.links = links
        self.blocks = blocks
        self.slots = slots
        self.slot_bytes = max(most_bytes / slots, 1.0)
        self._end = len(links) - 1
        self._weights = list(accumulate((x.weight_bytes for x in links), initial=0))
        self._times = list(accumulate((x.forward_us for x in links), initial=0.0))
        self._tables: dict[tuple[int, int], Table] = {}
        self._least_us: dict[tuple[int, int], float] = {}  # of each row with all the memory there is
        self._listed: dict[tuple[int, int], tuple[_Move, ...]] = {}
        self._chosen: dict[tuple[int, int, int], _Move] = {}
        self._fill()

    def points(self) -> list[int]:
        """The budgets, in slots, at which the least time falls; from small to large."""
        table = self._tables[0, self._end]
        falls = np.flatnonzero(table[1:] < table[:-1]) + 1
        return [0, *falls.tolist()] if np.isfinite(table[0]) else falls.tolist()

    def time_us(self, slot: int) -> float:
        """Least extra time at a budget [µs]."""
        return float(self._tables[0, self._end][slot])

    def steps(self, slot: int) -> list[Step]:
        """What to do at a budget, in order."""
        return list(self._steps(0, self._end, slot))

    def _fill(self) -> None:
        """Solve each row of segments, short ones first; rows of the same kinds share a table."""
        rows: dict[tuple[tuple[int, ...], bool], Table] = {}
        kinds = tuple(link.kind for link in self.links)
        for length in range(1, len(kinds) + 1):
            for first in range(len(kinds) - length + 1):
                last = first + length - 1
                row = kinds[first : last + 1], last == self._end
                if row not in rows:
                    rows[row] = self._solve(first, last)
                self._tables[first, last] = rows[row]
                self._least_us[first, last] = rows[row].item(-1)

    def _solve(self, first: int, last: int) -> Table:
        slots, tables = self.slots, self._tables
        table = np.full(slots + 1, np.inf)
        for move in self._moves(first, last):
            until, extra_us, least_slot, _, split, shift, shift_before = move
            start = max(least_slot, shift, shift_before)
            if start > slots:
                continue
            if table.item(start) <= self._bound_us(move, first, last):
                continue  # as tables fall, it is nowhere better
            value: Table | float = extra_us
            if until < last:
                value = value + _shifted(tables[until + 1, last], start, shift)
            if split:
                value = value + _shifted(tables[first, until], start, shift_before)
            rest = table[start:]
            np.minimum(rest, value, out=rest)
        return table

    def _bound_us(self, move: _Move, first: int, last: int) -> float:
        """The least time that a move takes with what comes after it, in whatever budget [µs]."""
        bound_us = move.extra_us
        if move.until < last:
            bound_us += self._least_us[move.until + 1, last]
        if move.split:
            bound_us += self._least_us[first, move.until]
        return bound_us

    def _steps(self, first: int, last: int, slot: int) -> Iterator[Step]:
        move = self._best(first, last, min(slot, self.slots))
        if move.choice is not None:
            yield Keep(first, move.until, move.choice)
        elif move.split:
            yield Forward(first, move.until)
        if move.until < last:
            yield from self._steps(move.until + 1, last, slot - move.shift)
        if move.split:
            yield Drop(move.until + 1)
            yield from self._steps(first, move.until, slot - move.shift_before)
        else:
            yield Backward(first, move.until)

    def _best(self, first: int, last: int, slot: int) -> _Move:
        """The first move that gives the least time."""
        key = first, last, slot
        if key not in self._chosen:
            self._chosen[key] = self._search(first, last, slot)
        return self._chosen[key]

    def _search(self, first: int, last: int, slot: int) -> _Move:
        if (first, last) not in self._listed:
            self._listed[first, last] = self._moves(first, last)
        best, best_us = None, float("inf")
        for move in self._listed[first, last]:
            if (
                slot < max(move.least_slot, move.shift, move.shift_before)
                or self._bound_us(move, first, last) >= best_us
            ):
                continue
            value = move.extra_us
            if move.until < last:
                value += float(self._tables[move.until + 1, last][min(slot - move.shift, self.slots)])
            if move.split:
                value += float(self._tables[first, move.until][min(slot - move.shift_before, self.slots)])
            if value < best_us:
                best, best_us = move, value
        if best is None:
            raise ValueError(f"segments {first} to {last} do not fit {slot} slots")
        return best

    def _moves(self, first: int, last: int) -> tuple[_Move, ...]:
        return (*self._block_moves(first, last), *self._split_moves(first, last))

    def _block_moves(self, first: int, last: int) -> Iterator[_Move]:
        inflow_bytes = 0 if last == self._end else self.links[last].inflow_bytes
        for until in range(first, last + 1):
            if (first, until) not in self.blocks:
                return
            cost = self.blocks[first, until]
            if until == last < self._end:
                yield _Move(until, cost.alone_us, self._up(cost.alone_peak_bytes), None, False, 0, 0)
                continue
            weight_bytes = self._weights[last + 1] - self._weights[until + 1]
            for choice in cost.choices:
                least = max(inflow_bytes + choice.forward_peak_bytes, choice.backward_peak_bytes + weight_bytes)
                time_us = choice.first_us if last == self._end else choice.again_us
                yield _Move(until, time_us, self._up(least), choice, False, self._near(choice.kept_bytes), 0)

    def _split_moves(self, first: int, last: int) -> Iterator[_Move]:
        inflow_bytes = 0 if last == self._end else self.links[last].inflow_bytes
        peak_bytes = 0
        for until in range(first, last):
            link = self.links[until]
            carried_bytes = link.boundary_bytes if until > first else 0
            peak_bytes = max(peak_bytes, carried_bytes + link.forward_peak_bytes)
            time_us = 0.0 if last == self._end else self._times[until + 1] - self._times[first]
            shift = self._near(self.links[until + 1].boundary_bytes)
            shift_before = self._near(self._weights[last + 1] - self._weights[until + 1])
            yield _Move(until, time_us, self._up(inflow_bytes + peak_bytes), None, True, shift, shift_before)

    def _up(self, size_bytes: float) -> int:
        return math.ceil(size_bytes / self.slot_bytes)

    def _near(self, size_bytes: float) -> int:
        return round(size_bytes / self.slot_bytes)


def _shifted(table: Table, start: int, shift: int) -> Table:
    """The entries for budgets from `start` on, each less `shift`; beyond the last the last one counts."""
    entries = table[start - shift : len(table) - shift] if shift > 0 else table[start - shift :]
    missing = len(table) - start - len(entries)
    return entries if missing <= 0 else np.concatenate((entries, np.full(missing, table[-1])))
