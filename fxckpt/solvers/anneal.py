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

from fxckpt.schedule import Schedule
from fxckpt.solvers.moves import earliest, empty_after, empty_before, latest, remove, shift, window
from fxckpt.solvers.room import make_room
from fxckpt.solvers.tape import EMPTY, Tape
from fxckpt.solvers.wiring import Wiring

_GAP = 6  # empty slots between two steps
_SPREAD_EVERY = 256  # moves after which the gaps are spread evenly again
_HOT, _COLD = 0.5, 0.005  # first and last temperature, in times of a mean repeat


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
        kinds: list[Callable[[], bool]] = [self._exchange, self._ruin, self._shift, self._spend]
        for number in range(moves):
            temperature_us = mean_us * _HOT * (_COLD / _HOT) ** (number / moves)
            move = self.rng.choices(kinds, weights=(2, 1, 2, 1))[0]
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

    def _exchange(self) -> bool:
        """Drop a repeat, rather a dear one, and make room for what that keeps alive."""
        repeats, times_us = self.tape.repeated(), self.wiring.times_us
        if not repeats:
            return False
        op, slot = max(self.rng.choices(repeats, k=2), key=lambda run: times_us[run[0]])
        remove(self.tape, slot)
        return self._repair(8, self.wiring.writes[op])

    def _ruin(self) -> bool:
        """Drop a few repeats that stand near each other, and make room again."""
        repeats = sorted(slot for _, slot in self.tape.repeated())
        if not repeats:
            return False
        count, i = self.rng.randrange(2, 7), self.rng.randrange(len(repeats))
        kept = self.wiring.writes[self.tape.slots[repeats[i]]]
        for slot in repeats[i : i + count]:
            remove(self.tape, slot)
        return self._repair(4 * count, kept) and self._drop_some(2)

    def _spend(self) -> bool:
        """Make room at the peak, then drop what repeats can be dropped."""
        return self._make_room() and self._drop_some(6)

    def _drop_some(self, tries: int) -> bool:
        repeats = self.tape.repeated()
        for _ in range(tries if repeats else 0):
            op, slot = self.rng.choice(repeats)
            if self.tape.slots[slot] != op:
                continue
            mark = self.tape.mark()
            remove(self.tape, slot)
            if self.tape.peak_bytes() > self.budget_bytes:
                self.tape.undo(mark)
        return True

    def _repair(self, most: int, kept: tuple[int, ...]) -> bool:
        """Make room until the peak fits, but not by dropping the storages `kept`."""
        for _ in range(most):
            if self.tape.peak_bytes() <= self.budget_bytes:
                return True
            if not self._make_room(kept):
                return False
        return self.tape.peak_bytes() <= self.budget_bytes

    def _make_room(self, kept: tuple[int, ...] = ()) -> bool:
        return make_room(self.tape, int(self.tape.live.argmax()), self.budget_bytes, self.rng, forbidden=kept)

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
