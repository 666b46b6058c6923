"""The calls of a step: what one has saved stays while the next ones run, so they share a budget.

Nobody tells what a step is. But a forward whose backward has not come yet is outstanding, and a step ends where none
is. The first time that a forward begins while others are outstanding it is planned in what they leave. When that step
has ended, its calls are planned together, and from the next on each takes its share. Steps that alternate, as those of
a generator and a discriminator do, are told apart by what followed what.
"""

from __future__ import annotations

import contextvars
import threading
import warnings
import weakref
from collections.abc import Collection, Sequence
from typing import Protocol

from fxckpt.core.shares import Offer, lean, peak_bytes, resident_bytes, share, share_in_any_order
from fxckpt.core.simulate import Timeline
from fxckpt.errors import OverBudgetWarning
from fxckpt.pipeline import Compiled
from fxckpt.units import format_bytes, within
from fxckpt.upstream.dispatch import backwards_context


class Kin:
    """The same for calls that differ only in whether they find gradients to add to."""


class Call(Protocol):
    """What can be called in a step: a model's forward for one form of input."""

    @property
    def owner(self) -> object:
        """Whose parameters it uses: the same object for calls of the same model."""

    @property
    def kin(self) -> Kin:
        """The same object for the same call with gradients fresh and allocated."""

    @property
    def expected(self) -> Compiled:
        """What it runs if it is alone in its step."""

    @property
    def fraction(self) -> float | None:
        """The budget, if it was given as a fraction of the plain step's peak."""

    def timelines(self, *, gradients_allocated: bool) -> Sequence[Timeline]:
        """The ways to run it, from lean to fast."""

    def variant(self, timeline: Timeline) -> Compiled:
        """What runs it in one of these ways."""


class Seat:
    """A call's place among those that are outstanding; it leaves when its backward has begun, or can't come."""

    def __init__(self, held_bytes: int, gradients_allocated: bool, ledger: Ledger) -> None:
        self.held_bytes, self.gradients_allocated = held_bytes, gradients_allocated
        self._ledger = ledger

    def leave(self) -> None:
        """It holds nothing from now on."""
        self._ledger.leave(self)


_Step = tuple[int, ...]
"""A step, by the ids of its calls' kin."""

_Planned = tuple[Compiled, ...]
"""What the calls of a step run."""


class Ledger:
    """The calls of one thread's steps."""

    def __init__(self) -> None:
        self._seats: list[Seat] = []
        self._calls: list[int] = []  # of the present step
        self._last: _Step = ()  # the step before
        self._followed: dict[_Step, _Step] = {}
        self._several: dict[_Step, bool] = {}  # steps of several calls: whether backwards come in any order
        self._planned: dict[tuple[_Step, bool, bool], _Planned] = {}  # by step, that order, allocated gradients
        self._known: dict[int, weakref.ref[Call]] = {}
        self._kin: dict[int, weakref.ref[Kin]] = {}
        self._in_any_order = False

    def take(self, call: Call) -> tuple[Compiled, Seat]:
        """What a call is to run now, and its seat, which is to leave when backward begins."""
        if not self._seats:
            self._end_step()
        self._know(call)
        self._calls.append(id(call.kin))
        step = self._likely()
        if step is not None:
            compiled = self._together(step, call)[len(self._calls) - 1]
        elif self._seats:
            compiled = self._in_what_is_left(call)
        else:
            compiled = call.expected
        allocated = call.expected.profile.graph.gradients_allocated
        seat = Seat(compiled.held_bytes, allocated, self)
        self._seats.append(seat)
        return compiled, seat

    def leave(self, seat: Seat) -> None:
        """A call holds nothing any more."""
        if seat in self._seats:
            self._in_any_order |= seat is not self._seats[-1]
            self._seats.remove(seat)

    def _know(self, call: Call) -> None:
        """Remember a call as long as it lives; what was planned with it goes with it."""
        key = id(call.kin)
        if key not in self._kin:
            self._kin[key] = weakref.ref(call.kin, lambda _: self._forget(key))
        self._known[key] = weakref.ref(call)

    def _forget(self, key: int) -> None:
        del self._kin[key], self._known[key]
        self._several = {step: order for step, order in self._several.items() if key not in step}
        self._planned = {which: planned for which, planned in self._planned.items() if key not in which[0]}
        self._followed = {a: b for a, b in self._followed.items() if key not in a and key not in b}

    def _end_step(self) -> None:
        """No call is outstanding: note what the step that has ended was."""
        step, in_any_order = tuple(self._calls), self._in_any_order
        self._calls, self._in_any_order = [], False
        if step and all(key in self._kin for key in step):
            self._followed[self._last] = self._last = step
            if len(step) > 1:
                self._several[step] = in_any_order or self._several.get(step, False)

    def _likely(self) -> _Step | None:
        """The step of several calls that begins like the present one, and most likely is it."""
        so_far = tuple(self._calls)
        next_one = self._followed.get(self._last, ())
        if next_one == so_far and len(so_far) == 1:
            return None
        for step in (next_one, *sorted(self._several, key=len, reverse=True)):
            if step in self._several and step[: len(so_far)] == so_far and all(self._known[key]() for key in step):
                return step
        return None

    def _together(self, step: _Step, call: Call) -> _Planned:
        """What the calls of a step run, planned when that is first asked for."""
        calls = [known for key in step if (known := self._known[key]()) is not None]
        first = self._seats[0].gradients_allocated if self._seats else call.expected.profile.graph.gradients_allocated
        which = step, self._several[step], first
        if which not in self._planned:
            self._planned[which] = _planned_together(calls, in_any_order=which[1], gradients_allocated=first)
        return self._planned[which]

    def _in_what_is_left(self, call: Call) -> Compiled:
        """The fastest way of a call that fits beside those that are outstanding, or the leanest, with a warning."""
        plan, allocated = call.expected.plan, call.expected.profile.graph.gradients_allocated
        kept = [self._known[key] for key in self._calls if key in self._known]  # models of others may be gone
        calls = [known for reference in kept if (known := reference()) is not None]
        others = {id(c.owner): c for c in calls if c.owner is not call.owner}
        beside_bytes = sum(seat.held_bytes for seat in self._seats)
        graphs = [c.expected.profile.graph for c in others.values()]
        beside_bytes += sum(resident_bytes(graph) - graph.library_bytes for graph in graphs)  # libraries serve all
        timelines = [plan.timeline, *call.timelines(gradients_allocated=allocated)]
        fitting = [t for t in timelines if t.peak_bytes + beside_bytes <= plan.budget_bytes]
        best = min(fitting or timelines, key=lambda t: t.step_us if fitting else t.peak_bytes)
        if not fitting:
            more = ". From the next such step on they are planned together"
            _warn(best.peak_bytes + beside_bytes, plan.budget_bytes, more)
        return call.expected if best is plan.timeline else call.variant(best)


def _planned_together(calls: Sequence[Call], *, in_any_order: bool, gradients_allocated: bool) -> _Planned:
    """What each call of a step runs so that the step fits its budget, in the least time.

    Args:
        calls: the calls, in order.
        in_any_order: whether their backwards may come in another order than the reverse.
        gradients_allocated: whether there are gradients to add to before the step.
    """
    before = [{id(c.owner) for c in (*calls[i + 1 :], *(calls[:i] if in_any_order else ()))} for i in range(len(calls))]
    timelines = [
        call.timelines(gradients_allocated=gradients_allocated or id(call.owner) in owners)
        for call, owners in zip(calls, before, strict=True)
    ]
    offers = [[Offer.of(timeline) for timeline in ways] for ways in timelines]
    beside_bytes = [_beside_bytes(calls, owners, gradients_allocated) for owners in before]
    budgets = [_budget_bytes(call, offers, beside) for call, beside in zip(calls, beside_bytes, strict=True)]
    rooms = [budget - beside for budget, beside in zip(budgets, beside_bytes, strict=True)]
    chosen = share_in_any_order(offers, min(rooms)) if in_any_order else share(offers, rooms)
    if chosen is None:
        chosen = lean(offers)
        tight = min(range(len(calls)), key=rooms.__getitem__)
        _warn(peak_bytes(offers, chosen) + beside_bytes[tight], budgets[tight])
    picked = [ways[i] for ways, i in zip(timelines, chosen, strict=True)]
    return tuple(call.variant(timeline) for call, timeline in zip(calls, picked, strict=True))


def _beside_bytes(calls: Sequence[Call], with_gradients: Collection[int], gradients_allocated: bool) -> int:
    """What is there while a call runs, beside what calls take: parts of all models, and gradients [B].

    Gradients are there for all models, if they are allocated, else for those whose ids are in `with_gradients`.
    """
    sum_bytes = library_bytes = 0
    for key, call in {id(c.owner): c for c in calls}.items():
        graph = call.expected.profile.graph.with_gradients(gradients_allocated or key in with_gradients)
        sum_bytes += resident_bytes(graph) - graph.library_bytes
        library_bytes = max(library_bytes, graph.library_bytes)  # they serve all models
    return sum_bytes + library_bytes


def _budget_bytes(call: Call, offers: Sequence[Sequence[Offer]], beside_bytes: int) -> int:
    """The budget of the step that a call is part of [B]."""
    if call.fraction is None:
        return call.expected.plan.budget_bytes
    plain = tuple(len(ways) - 1 for ways in offers)
    kept_bytes = call.expected.profile.graph.library_bytes
    return within(call.fraction, peak_bytes(offers, plain) + beside_bytes, kept_bytes)


def _warn(reached_bytes: int, budget_bytes: int, more: str = "") -> None:
    warnings.warn(
        f"the calls of a step, of which several are outstanding at once, take {format_bytes(reached_bytes)} together, "
        f"{format_bytes(reached_bytes - budget_bytes)} over the budget of {format_bytes(budget_bytes)}{more}",
        OverBudgetWarning,
        stacklevel=2,
    )


_ledgers = threading.local()
_of_caller: contextvars.ContextVar[Ledger] = contextvars.ContextVar("_of_caller")
"""The same by thread; which context it is in others' threads can tell."""


def ledger() -> Ledger:
    """The present thread's ledger; within backward, which may run in a thread of a device, that of who called it."""
    context = backwards_context()
    found = None if context is None else context.get(_of_caller)
    if found is not None:
        return found
    if not hasattr(_ledgers, "one"):
        _ledgers.one = Ledger()
    own: Ledger = _ledgers.one
    _of_caller.set(own)
    return own
