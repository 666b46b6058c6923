"""Simulated annealing over schedules: the bounded, seeded search behind `polish`.

The state always fits the budget. A move drops some repeats and makes room again by dropping idle copies elsewhere, or
makes room first and then drops what repeats that allows, or shifts a run. Slower states are accepted with a probability
that falls with the number of moves made (Kirkpatrick, Gelatt, Vecchi 1983), never with the clock. Short restarts from
the best schedule beat one long run.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from random import Random

from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.search.moves import earliest, empty_after, empty_before, latest, remove, shift, window
from fxckpt.core.solvers.search.room import make_room, reach
from fxckpt.core.solvers.search.tape import EMPTY, Tape
from fxckpt.core.solvers.search.wiring import Wiring

_GAP = 6  # empty slots between two steps
_SPREAD_EVERY = 256  # moves after which the gaps are spread evenly again
_HOT, _COLD = 0.2, 0.002  # first and last temperature, in times of a mean repeat
_SLOWEST_RATIO = 0.002  # a move that makes the step slower by more is given up


def anneal(wiring: Wiring, schedule: Schedule, budget_bytes: int, *, restarts: int, moves: int) -> Schedule:
    """The fastest schedule met; the one given if none is faster, or if it is over the budget."""
    best = schedule
    for seed in range(restarts):
        search = _Search(wiring, best, budget_bytes, Random(seed))
        search.run(moves)
        best = search.best
    return best


class _Search:
    """One run: the tape, the time of its schedule, and the best schedule so far."""

    def __init__(self, wiring: Wiring, schedule: Schedule, budget_bytes: int, rng: Random) -> None:
        self.wiring = wiring
        self.rng = rng
        self.budget_bytes = budget_bytes
        self.tape = Tape(wiring, schedule, gap=_GAP)
        self.step_us = self.tape.step_us
        self.best, self.best_us = schedule, self.step_us

    def run(self, moves: int) -> None:
        """Make so many moves."""
        repeats = self.tape.repeated()
        mean_us = sum(self.wiring.times_us[op] for op, _ in repeats) / max(len(repeats), 1)
        if not mean_us or self.tape.peak_bytes() > self.budget_bytes:
            return
        kinds: tuple[Callable[[], bool], ...] = (self._ruin, self._shift, self._spend)
        for number in range(moves):
            temperature_us = mean_us * _HOT * (_COLD / _HOT) ** (number / moves)
            move = self.rng.choices(kinds, weights=(3, 3, 1))[0]
            mark = self.tape.mark()
            if move() and self._accept(temperature_us):
                self.tape.commit()
            else:
                self.tape.undo(mark)
            if number % _SPREAD_EVERY == _SPREAD_EVERY - 1:
                self.tape = Tape(self.wiring, self.tape.schedule(), gap=_GAP)
                self.step_us = self.tape.step_us

    def _accept(self, temperature_us: float) -> bool:
        if self.tape.peak_bytes() > self.budget_bytes:
            return False
        step_us = self.tape.step_us
        slower_us = step_us - self.step_us
        if slower_us > 0 and self.rng.random() >= exp(-slower_us / temperature_us):
            return False
        self.step_us = step_us
        if step_us < self.best_us * (1 - 1e-12):
            self.best, self.best_us = self.tape.schedule(), step_us
        return True

    def _ruin(self) -> bool:
        """Drop one or a few repeats that stand near each other, and make room again, not quite for the least time."""
        tape, rng = self.tape, self.rng
        repeats = sorted(slot for _, slot in tape.repeated())
        if not repeats:
            return False
        count, i = rng.choice((1, 1, 2, 3, 5, 8)), rng.randrange(len(repeats))
        kept = self.wiring.writes[tape.slots[repeats[i]]] if rng.random() < 0.7 else ()
        for slot in repeats[i : i + count]:
            remove(tape, slot)
        most_us, noise = self.step_us * (1 + _SLOWEST_RATIO), rng.choice((0.0, 0.2, 0.5))
        return reach(tape, self.budget_bytes, rng, forbidden=kept, most_us=most_us, noise=noise)

    def _spend(self) -> bool:
        """Make room at the peak, then drop what repeats can be dropped."""
        if not make_room(self.tape, int(self.tape.live.argmax()), self.budget_bytes, self.rng):
            return False
        repeats = self.tape.repeated()
        for op, slot in self.rng.choices(repeats, k=6):
            if self.tape.slots[slot] != op:
                continue
            mark = self.tape.mark()
            remove(self.tape, slot)
            if self.tape.peak_bytes() > self.budget_bytes:
                self.tape.undo(mark)
        return True

    def _shift(self) -> bool:
        """Move a backward run to another place in its window."""
        tape, rng = self.tape, self.rng
        slot = rng.randrange(tape.split + 1, tape.end + 1)
        while slot < tape.end and tape.slots[slot] == EMPTY:
            slot += 1
        if slot == tape.end:
            return False
        low, high = window(tape, slot)
        around = rng.randrange(low, high)
        ways: tuple[Callable[[], int], ...] = (
            lambda: latest(tape, slot),
            lambda: earliest(tape, slot),
            lambda: empty_before(tape, around + 1, low),
            lambda: empty_after(tape, around, high),
        )
        target = rng.choice(ways)()
        if target < 0:
            return False
        shift(tape, slot, target)
        return True
