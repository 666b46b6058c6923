"""Improve a schedule by editing it: the same peak or less, never slower.

A solver that thinks in segments leaves something on the table: recomputations that the budget no longer requires,
values made again too early, gradients of weights that wait while memory is short. Every one of these is an edit of the
sequence, and any edit that keeps first runs in a legal order is valid, so a local search with an exact simulator
(`search.tape`) takes them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers.keep import pinned_storages, schedule_keeping
from fxckpt.core.solvers.mincut import KeepProblem
from fxckpt.core.solvers.search.anneal import anneal
from fxckpt.core.solvers.search.moves import area_shifted, earliest, latest, remove, shift
from fxckpt.core.solvers.search.room import reach
from fxckpt.core.solvers.search.tape import EMPTY, Tape
from fxckpt.core.solvers.search.wiring import Wiring

_GAP = 4  # empty slots between two steps
_MOST_OPS = 3000  # of graphs that are worth more than one start
_MOST_EDITS = 200_000  # after which `trim` leaves the rest, in schedules of ten thousands of repeats


@dataclass(frozen=True, slots=True)
class Search:
    """How long to search. With nothing but zeros each start is only tightened and trimmed, which takes milliseconds.

    Attributes:
        choices: how many minimum cuts of the whole graph are tried as starts besides the schedule given.
        exchanged: for how many of the best starts one repeat is exchanged for others, one after another.
        annealed: how many of the best are then searched from at random.
        restarts, moves: how often the search begins anew, and how many moves it makes each time.
    """

    choices: int = 0
    exchanged: int = 0
    annealed: int = 0
    restarts: int = 0
    moves: int = 0


SHORT = Search()
"""The shortest search."""


def polish(
    graph: Graph,
    schedule: Schedule,
    budget_bytes: int,
    *,
    search: Search = SHORT,
    others: Iterable[Schedule] = (),
) -> Schedule:
    """A schedule that is at most as slow as the one given and fits the budget, if that can be reached.

    Args:
        graph: the training step.
        schedule: a valid schedule of it.
        budget_bytes: the most its peak may be, as `simulate` counts [B].
        search: how long to search. It is bounded by numbers of edits, so the same call always gives the same schedule.
        others: valid schedules to start from too, over the budget or not.

    Returns:
        A valid schedule. If the one given fits, so does the result, and it takes no more time. If it does not, the
        result fits at the price of more recomputation, or has the lowest peak that was met.
    """
    wiring = Wiring(graph)
    found = [schedule, *(greedy(wiring, one, budget_bytes) for one in (schedule, *others))]
    if search.choices and schedule.order and graph.plain_count <= _MOST_OPS:
        found += [greedy(wiring, other, budget_bytes) for other in _other_starts(graph, search.choices)]

    ranks: dict[Schedule, tuple[int, float, float]] = {}

    def rank(one: Schedule) -> tuple[int, float, float]:
        if one not in ranks:
            ranks[one] = _rank(graph, one, budget_bytes)
        return ranks[one]

    def best(number: int) -> list[Schedule]:
        return sorted(found, key=rank)[:number]

    found += [_exchanged(wiring, one, budget_bytes) for one in best(search.exchanged)]
    restarts, moves = search.restarts, search.moves
    found += [anneal(wiring, one, budget_bytes, restarts=restarts, moves=moves) for one in best(search.annealed)]
    return best(1)[0]


def _rank(graph: Graph, schedule: Schedule, budget_bytes: int) -> tuple[int, float, float]:
    """The smaller the better: what fits by time, what doesn't by peak."""
    timeline = simulate(graph, schedule)
    if timeline.peak_bytes <= budget_bytes:
        return 0, timeline.step_us, timeline.peak_bytes
    return 1, timeline.peak_bytes, timeline.step_us


def _other_starts(graph: Graph, choices: int) -> Iterator[Schedule]:
    """The plain step, and what to keep at different prices of a byte, without a look at segments."""
    yield plain(graph)
    problem = KeepProblem(graph, {*graph.outputs, *pinned_storages(graph)})
    for kept in problem.hull(choices):
        yield schedule_keeping(graph, kept)


def greedy(wiring: Wiring, schedule: Schedule, budget_bytes: int) -> Schedule:
    """Bring a schedule under the budget, tighten it, and drop the repeats that this makes superfluous."""
    tape = Tape(wiring, schedule, gap=_GAP)
    reach(tape, budget_bytes, Random(0))
    tape.commit()
    tighten(tape)
    trim(tape, budget_bytes)
    return tape.schedule()


def _exchanged(wiring: Wiring, schedule: Schedule, budget_bytes: int) -> Schedule:
    tape = Tape(wiring, schedule, gap=_GAP)
    if tape.peak_bytes() <= budget_bytes:
        exchange(tape, budget_bytes)
        tighten(tape)
        trim(tape, budget_bytes)
    return tape.schedule()


def trim(tape: Tape, budget_bytes: int) -> None:
    """Drop repeats, dearest first, while the peak stays within the budget (or is no higher than it was)."""
    times_us = tape.wiring.times_us
    limit_bytes = max(budget_bytes, tape.peak_bytes())
    for op, slot in sorted(tape.repeated(), key=lambda run: (-times_us[run[0]], run)):
        if tape.slots[slot] != op:
            continue
        if tape.edits > _MOST_EDITS:
            break
        mark = tape.mark()
        remove(tape, slot)
        if tape.risen_bytes() > limit_bytes:
            tape.undo(mark)
    tape.commit()


def exchange(tape: Tape, budget_bytes: int) -> None:
    """Drop each repeat, dearest first, and make room for what that keeps alive, where this costs less than it saves."""
    times_us, rng = tape.wiring.times_us, Random(0)
    for op, slot in sorted(tape.repeated(), key=lambda run: (-times_us[run[0]], run)):
        if tape.slots[slot] != op:
            continue
        mark, most_us = tape.mark(), tape.step_us * (1 - 1e-9)
        remove(tape, slot)
        kept = tape.wiring.writes[op]
        if reach(tape, budget_bytes, rng, forbidden=kept, most_us=most_us) and tape.step_us < most_us:
            tape.commit()
        else:
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
    if area_shifted(tape, slot, target) >= 0:
        tape.edits += 4  # what trying and undoing it takes
        return False
    mark, before = tape.mark(), tape.area
    shift(tape, slot, target)
    if tape.area < before and tape.risen_bytes() <= limit_bytes and tape.area < before:  # hand-overs may move with it
        return True
    tape.undo(mark)
    return False
