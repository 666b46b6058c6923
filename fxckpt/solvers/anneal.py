"""Simulated annealing over schedules: the bounded, seeded search behind `polish`.

The state always fits the budget. A move drops some repeats and makes room again by dropping idle copies elsewhere, or
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
        self.limit_bytes = max(budget_bytes, self.tape.peak_bytes())
        self.budget_bytes = budget_bytes
        self.time_us = self.tape.step_us
        self.best, self.best_us = schedule, self.time_us
        self.stats = {}

    def run(self, moves: int) -> None:
        repeats = self.tape.repeated()
        mean_us = sum(self.wiring.times_us[op] for op, _ in repeats) / max(len(repeats), 1)
        if not mean_us or self.limit_bytes > self.budget_bytes:
            return
        hot, cold = mean_us * HOT, mean_us * HOT * 0.01
        for number in range(moves):
            temperature = hot * (cold / hot) ** (number / moves)
            move = self.rng.choices(MOVES, weights=WEIGHTS)[0]
            mark = self.tape.mark()
            st = self.stats.setdefault(move.__name__, [0, 0, 0,0,0.,0.])
            st[0] += 1
            b0,t0=self.best_us,self.time_us
            import time; tt=time.perf_counter()
            ok=move(self); st[1]+=ok
            if ok and self._accept(temperature):
                st[2] += 1
                st[3]+= t0>self.time_us
                st[4]+=b0-self.best_us
                self.tape.commit()
            else:
                self.tape.undo(mark)
            st[5]+=time.perf_counter()-tt
            if number % 256 == 255:
                self.tape = Tape(self.wiring, self.tape.schedule(), gap=GAP)
                self.time_us = self.tape.step_us
        if VERBOSE: 
            for k,v in self.stats.items(): print('   ',k,v[:4],'gain %.0f time %.2f us/move %.0f'%(v[4],v[5],v[5]/v[0]*1e6))

    def _accept(self, temperature: float) -> bool:
        if self.tape.peak_bytes() > self.limit_bytes:
            return False
        time_us = self.tape.step_us
        slower_us = time_us - self.time_us
        if slower_us > 0 and self.rng.random() >= exp(-slower_us / temperature):
            return False
        self.time_us = time_us
        if time_us < self.best_us - 1e-6:
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
        return self._repair(8)

    def _ruin(self) -> bool:
        """Drop all repeats of a stretch of the schedule, or some of them, and make room again."""
        repeats = sorted(slot for _, slot in self.tape.repeated())
        if not repeats:
            return False
        rng = self.rng
        count = rng.randrange(2, 9)
        i = rng.randrange(len(repeats))
        for slot in repeats[i : i + count]:
            if self.tape.slots[slot] != EMPTY:
                remove(self.tape, slot)
        return self._repair(4*count) and self._drop_some(2)

    def _spend(self) -> bool:
        """Make room somewhere, then drop what repeats can be dropped."""
        slot = int(self.tape.live.argmax())
        if not make_room(self.tape, slot, self.limit_bytes, self.rng):
            return False
        return self._drop_some(6)

    def _drop_some(self, tries: int) -> bool:
        repeats = self.tape.repeated()
        for _ in range(tries if repeats else 0):
            op, slot = self.rng.choice(repeats)
            if self.tape.slots[slot] != op:
                continue
            mark = self.tape.mark()
            remove(self.tape, slot)
            if self.tape.peak_bytes() > self.limit_bytes:
                self.tape.undo(mark)
        return True

    def _repair(self, most: int) -> bool:
        """Make room until the peak fits."""
        for _ in range(most):
            if self.tape.peak_bytes() <= self.limit_bytes:
                return True
            if not make_room(self.tape, int(self.tape.live.argmax()), self.limit_bytes, self.rng):
                return False
        return self.tape.peak_bytes() <= self.limit_bytes

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
HOT=0.5
VERBOSE=0
MOVES=(_Search._exchange,_Search._ruin,_Search._shift,_Search._spend)
WEIGHTS=(2,1,2,1)
