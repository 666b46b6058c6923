"""Improve a schedule by editing it: the same peak or less, never slower.

A solver that thinks in segments leaves something on the table: recomputations that the budget no longer requires,
values made again too early, gradients of weights that wait while memory is short. Every one of these is an edit of the
sequence, and any edit that keeps first runs in a legal order is valid, so a local search with an exact simulator
(`fxckpt.solvers.tape`) takes them one by one.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from fxckpt.graph import Graph
from fxckpt.schedule import Schedule
from fxckpt.simulate import simulate
from fxckpt.solvers.anneal import Effort, anneal
from fxckpt.solvers.moves import earliest, latest, remove, shift
from fxckpt.solvers.room import reach
from fxckpt.solvers.tape import EMPTY, Tape
from fxckpt.solvers.wiring import Wiring

EffortName = Literal["fast", "default", "max"]
EFFORTS: dict[EffortName, Effort] = {
    "fast": Effort(rounds=1, restarts=0, moves=0),
    "default": Effort(rounds=3, restarts=2, moves=400),
    "max": Effort(rounds=3, restarts=12, moves=40000),
}
GAP = 4


def polish(graph: Graph, schedule: Schedule, budget_bytes: int, *, effort: EffortName = "default") -> Schedule:
    """A schedule that is at most as slow and fits the budget, if that can be reached from the one given.

    Args:
        graph: the training step.
        schedule: a valid schedule of it; its forward part is left as it is.
        budget_bytes: the most its peak may be, as `simulate` counts [B].
        effort: "fast" takes milliseconds, "default" a second or two for some hundred ops, "max" up to a minute. All
            are bounded by numbers of edits, so the same call always gives the same schedule.

    Returns:
        A valid schedule. If the one given fits, so does the result, and it takes no more time. If it does not, the
        result fits at the price of more recomputation, or has the lowest peak that was met.
    """
    wiring = Wiring(graph)
    level = EFFORTS[effort]
    tape = Tape(wiring, schedule, gap=GAP)
    if tape.peak_bytes() > budget_bytes:
        reach(tape, budget_bytes, Random(0))
    for _ in range(level.rounds):
        before = tape.step_us
        tighten(tape)
        trim(tape, budget_bytes)
        if tape.step_us >= before:
            break
    found = tape.schedule()
    if level.moves and found.order:
        found = anneal(wiring, found, budget_bytes, level)
    return _better(graph, schedule, found, budget_bytes)


def _better(graph: Graph, first: Schedule, second: Schedule, budget_bytes: int) -> Schedule:
    """Of two schedules the faster that fits, or the one of lower peak; the first if they are equal."""

    def rank(schedule: Schedule) -> tuple[int, float, float]:
        timeline = simulate(graph, schedule)
        if timeline.peak_bytes <= budget_bytes:
            return 0, timeline.step_us, timeline.peak_bytes
        return 1, timeline.peak_bytes, timeline.step_us

    return min(first, second, key=rank)


def trim(tape: Tape, budget_bytes: int) -> None:
    """Drop repeats, dearest first, while the peak stays within the budget (or is no higher than it was)."""
    times_us = tape.wiring.times_us
    limit_bytes = max(budget_bytes, tape.peak_bytes())
    for op, slot in sorted(tape.repeated(), key=lambda run: (-times_us[run[0]], run)):
        if tape.slots[slot] != op:
            continue
        mark = tape.mark()
        remove(tape, slot)
        if tape.peak_bytes() > limit_bytes:
            tape.undo(mark)
    tape.commit()


def tighten(tape: Tape) -> None:
    """Move runs later, or first runs of backward ops earlier, where fewer bytes are then held, summed over the steps.

    From the end to the beginning, so that a chain of repeats follows its last reader.
    """
    limit_bytes = tape.peak_bytes()
    for slot in range(tape.end - 1, tape.split, -1):
        op = tape.slots[slot]
        if op == EMPTY:
            continue
        ways = (latest,) if tape.runs[op][0] != slot else (latest, earliest)
        for way in ways:
            target = way(tape, slot)
            if target >= 0 and _shift_if_smaller(tape, slot, target, limit_bytes):
                break
    tape.commit()


def _shift_if_smaller(tape: Tape, slot: int, target: int, limit_bytes: int) -> bool:
    mark, before = tape.mark(), int(tape.live.sum())
    shift(tape, slot, target)
    if tape.peak_bytes() <= limit_bytes and int(tape.live.sum()) < before:
        return True
    tape.undo(mark)
    return False
