"""Simulated annealing over schedules: the bounded, seeded search behind `polish`.

The state always fits the budget. A move drops a dear repeat and makes room again by dropping idle copies elsewhere, or
shifts a run, or makes room first and then spends it. Slower states are accepted with a probability that falls with the
number of moves made (Kirkpatrick et al. 1983), never with the clock. Short restarts from the best schedule beat one
long run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from random import Random

from fxckpt.schedule import Schedule
from fxckpt.solvers.moves import earliest, empty_after, empty_before, latest, remove, shift, window
from fxckpt.solvers.room import make_room
from fxckpt.solvers.tape import EMPTY, Tape
from fxckpt.solvers.wiring import Wiring

GAP = 6


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search: rounds of greedy passes, restarts, and moves in each."""

    rounds: int
    restarts: int
    moves: int


def anneal(wiring: Wiring, schedule: Schedule, budget_bytes: int, effort: Effort) -> Schedule:
    """The best schedule met; the one given if none is better."""
    best = schedule
    for seed in range(effort.restarts):
        search = _Search(wiring, best, budget_bytes, Random(seed))
        search.run(effort.moves)
        best = search.best
    return best


class _Search:
    def __init__(self, wiring: Wiring, schedule: Schedule, budget_bytes: int, rng: Random) -> None:
        self.wiring = wiring
        self.rng = rng
        self.tape = Tape(wiring, schedule, gap=GAP)
        self.time_us = self.tape.step_us
        self.limit_bytes = max(budget_bytes, self.tape.peak_bytes())
        self.budget_bytes = budget_bytes
        self.best, self.best_us = schedule, self.time_us

    def run(self, moves: int) -> None:
        repeats = self.tape.repeated()
        mean_us = sum(self.wiring.times_us[op] for op, _ in repeats) / max(len(repeats), 1)
        if not mean_us or self.limit_bytes > self.budget_bytes:
            return
        hot, cold = mean_us * 0.5, mean_us * 0.005
        for number in range(moves):
            temperature = hot * (cold / hot) ** (number / moves)
            move = self.rng.choice((self._exchange, self._exchange, self._shift, self._shift, self._spend))
            mark = self.tape.mark()
            if move() and self._accept(temperature):
                self.tape.commit()
            else:
                self.tape.undo(mark)
            if number % 512 == 511:
                self.tape = Tape(self.wiring, self.tape.schedule(), gap=GAP)

    def _accept(self, temperature: float) -> bool:
        if self.tape.peak_bytes() > self.limit_bytes:
            return False
        time_us = self.tape.step_us
        slower_us = time_us - self.time_us
        if slower_us > 0 and self.rng.random() >= exp(-slower_us / max(temperature, 1e-12)):
            return False
        self.time_us = time_us
        if time_us < self.best_us - 1e-9:
            self.best, self.best_us = self.tape.schedule(), time_us
        return True

    def _exchange(self) -> bool:
        """Drop a repeat and make room for what that keeps alive."""
        repeats = self.tape.repeated()
        if not repeats:
            return False
        times_us = self.wiring.times_us
        _, slot = max(self.rng.choices(repeats, k=2), key=lambda run: times_us[run[0]])
        remove(self.tape, slot)
        return self._repair()

    def _spend(self) -> bool:
        """Make room somewhere, then drop what repeats can be dropped."""
        slot = self._critical()
        if not self._make_room(slot):
            return False
        return self._drop_some(6)

    def _drop_some(self, tries: int) -> bool:
        repeats = self.tape.repeated()
        for _ in range(tries):
            op, slot = self.rng.choice(repeats)
            if self.tape.slots[slot] != op:
                continue
            mark = self.tape.mark()
            remove(self.tape, slot)
            if self.tape.peak_bytes() > self.limit_bytes:
                self.tape.undo(mark)
        return True

    def _critical(self) -> int:
        live = self.tape.live
        return int(live.argmax())

    def _repair(self) -> bool:
        """Make room until the peak fits."""
        for _ in range(6):
            if self.tape.peak_bytes() <= self.limit_bytes:
                return True
            if not self._make_room(self._critical()):
                return False
        return self.tape.peak_bytes() <= self.limit_bytes

    def _make_room(self, slot: int) -> bool:
        return make_room(self.tape, slot, self.limit_bytes, self.rng)

    def _shift(self) -> bool:
        """Move a backward run to another place in its window."""
        tape, rng = self.tape, self.rng
        for _ in range(8):
            slot = rng.randrange(tape.split + 1, tape.end)
            if tape.slots[slot] != EMPTY:
                break
        else:
            return False
        low, high = window(tape, slot)
        way = rng.randrange(4)
        if way == 0:
            target = latest(tape, slot)
        elif way == 1:
            target = earliest(tape, slot)
        else:
            if high - low < 3:
                return False
            around = rng.randrange(low + 1, high)
            target = empty_before(tape, around + 1, low) if way == 2 else empty_after(tape, around - 1, high)
        if target < 0:
            return False
        shift(tape, slot, target)
        return True
