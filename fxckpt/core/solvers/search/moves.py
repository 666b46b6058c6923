"""Edits of a tape that keep the schedule valid: drop a repeat, move a run, drop a storage and remake it later.

Each move edits the tape and leaves it to the caller to look at peak and time and to undo. None of them touches forward.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import inf
from random import Random

from fxckpt.core.solvers.search.tape import EMPTY, Tape

REACH = 24  # slots that are searched for an empty one
DEEPEST = 24  # ops that one remade storage may need


def remove(tape: Tape, slot: int) -> None:
    """Drop a repeat, and every repeat before it that nobody then reads."""
    pending = [slot]
    while pending:
        slot = pending.pop()
        op = tape.slots[slot]
        if op == EMPTY or slot == tape.split:  # an anchored first step stays
            continue
        tape.take(slot)
        for storage in tape.wiring.reads[op]:
            births = tape.births[storage]
            number = bisect_left(births, slot) - 1
            if number >= 1 and tape.first_reader(tape.wiring.producer[storage], births[number]) < 0:
                pending.append(births[number])


def empty_before(tape: Tape, slot: int, after: int) -> int:
    """The last empty slot before `slot`, not far away and later than `after`; -1 if there is none."""
    slots, lowest = tape.slots, max(after, tape.split, slot - REACH)
    for candidate in range(slot - 1, lowest, -1):
        if slots[candidate] == EMPTY:
            return candidate
    return -1


def empty_after(tape: Tape, slot: int, before: int) -> int:
    """The first empty slot after `slot`, not far away and earlier than `before`; -1 if there is none."""
    slots, highest = tape.slots, min(before, tape.end, slot + REACH)
    for candidate in range(slot + 1, highest):
        if slots[candidate] == EMPTY:
            return candidate
    return -1


def window(tape: Tape, slot: int) -> tuple[int, int]:
    """The slots between which a backward run may move without changing what anything computes, both excluded."""
    wiring, runs = tape.wiring, tape.runs
    op = tape.slots[slot]
    if slot <= tape.split:
        return slot, slot
    number = bisect_left(runs[op], slot)
    if number:
        low = runs[op][number - 1]
        high = tape.first_reader(op, slot)
        high = tape.end if high < 0 else high
        if number + 1 < len(runs[op]):
            high = min(high, runs[op][number + 1])
        return max(low, tape.split), high
    producers = [wiring.producer[s] for s in wiring.reads[op]]
    low = max((runs[p][0] for p in producers if p >= 0), default=-1)
    high = min((runs[d][0] for d in wiring.dependents[op]), default=tape.end)
    if len(runs[op]) > 1:
        high = min(high, runs[op][1])
    if wiring.ordered[op]:
        for other in wiring.ordered_ops:
            if other < op:
                low = max(low, runs[other][0])
            elif other > op:
                high = min(high, runs[other][0])
    return max(low, tape.split), high


def shift(tape: Tape, slot: int, target: int) -> None:
    """Move a run to an empty slot."""
    op = tape.slots[slot]
    tape.take(slot)
    tape.put(op, target)


def area_shifted(tape: Tape, slot: int, target: int) -> int:
    """By how much `tape.area` grows if a run moves within its window, a repeat to a later slot [B].

    As if gradients were still handed over where they are.
    """
    wiring, op = tape.wiring, tape.slots[slot]
    runs = tape.runs[op]
    area = 0
    if wiring.replay_bytes[op] and len(runs) > 1:
        area += wiring.replay_bytes[op] * (target - slot) * ((runs[-1] == slot) - (runs[0] == slot))
    for storage in wiring.writes[op]:
        if size := wiring.sizes[storage]:
            last = tape.last_use(storage, bisect_left(runs, slot))
            area += size * (max(target, last) - target - max(slot, last) + slot)
    for storage in wiring.reads[op]:
        if size := wiring.sizes[storage]:
            area += size * _read_shifted(tape, storage, slot, target)
    return area


def _read_shifted(tape: Tape, storage: int, slot: int, target: int) -> int:
    """By how many slots copies of a storage live longer if a run that reads it moves."""
    births = tape.births[storage]
    old, new = bisect_left(births, slot) - 1, bisect_left(births, target) - 1
    if old < 0:
        return 0
    rest = max(births[old], tape.last_use(storage, old, without=slot))
    if old == new:
        return max(rest, target) - max(rest, slot)
    return rest - max(rest, slot) + max(target - tape.copy_at(storage, target)[1], 0)


def latest(tape: Tape, slot: int) -> int:
    """The last slot to which a run can move; -1 if it can't move on."""
    low, high = window(tape, slot)
    return empty_before(tape, high, max(slot, low))


def earliest(tape: Tape, slot: int) -> int:
    """The first slot to which a run can move; -1 if it can't move back."""
    low, high = window(tape, slot)
    return empty_after(tape, low, min(slot, high))


@dataclass(frozen=True, slots=True)
class Idle:
    """A copy that is kept over a slot only for later: `storage`, last used in slot `since` and next in slot `until`."""

    storage: int
    since: int
    until: int


def idle_at(tape: Tape, storage: int, slot: int) -> Idle | None:
    """The idle stretch of a storage around a slot, or None if it is not live there, in use, or can't be remade."""
    births, readers = tape.births[storage], tape.readers[storage]
    number = bisect_right(births, slot) - 1
    if number < 0 or births[number] == slot or (number == 0 and tape.hold[storage] >= slot):
        return None
    i = bisect_left(readers, slot)
    if i == len(readers) or (until := readers[i]) == slot or until <= tape.split:
        return None
    if number + 1 < len(births) and births[number + 1] < until:
        return None
    return Idle(storage, max(births[number], readers[i - 1] if i else -1), until)


def remake_us(tape: Tape, idle: Idle, most_us: float = inf) -> float:
    """What dropping an idle copy costs: the time of all ops whose results are gone when it is needed again [µs].

    Infinite where something pinned is among them, or where it is more than `most_us`.
    """
    wiring, until = tape.wiring, idle.until
    readers = tape.readers
    pending = [wiring.producer[idle.storage]]
    seen, total_us = set(pending), 0.0
    while pending:
        op = pending.pop()
        total_us += wiring.times_us[op]
        if wiring.pinned[op] or total_us > most_us:
            return inf
        for storage in wiring.reads[op]:
            producer = wiring.producer[storage]
            if producer < 0 or producer in seen:
                continue
            if readers[storage][-1] < until or tape.copy_at(storage, until)[1] < until:
                seen.add(producer)
                pending.append(producer)
    return total_us


def remake(tape: Tape, idle: Idle, budget_bytes: int, rng: Random) -> bool:
    """Drop an idle copy and run its producer again just before the next reader, with what that needs and is gone.

    A gone input is either remade too or kept till then, whichever seems to fit. Returns False, with the tape possibly
    half edited, where there is no room or something pinned is in the way.
    """
    wiring = tape.wiring
    pending = [(wiring.producer[idle.storage], idle.until)]
    placed: dict[int, int] = {}
    while pending:
        pending.sort()
        op, reader = pending.pop()  # the latest op in graph order first: its inputs come before it
        if op in placed:
            continue
        slot = empty_before(tape, reader, tape.runs[op][0])
        if slot < 0 or wiring.pinned[op] or len(placed) == DEEPEST:
            return False
        gone = []
        for storage in wiring.reads[op]:
            dies = tape.copy_at(storage, slot)[1]
            if dies < slot and not _keep(tape, storage, dies, slot, idle, budget_bytes, rng):
                gone.append(wiring.producer[storage])
        tape.put(op, slot)
        placed[op] = slot
        pending += [(producer, slot) for producer in gone]
    return True


def _keep(tape: Tape, storage: int, dies: int, slot: int, idle: Idle, budget_bytes: int, rng: Random) -> bool:
    producer = tape.wiring.producer[storage]
    if producer < 0 or tape.wiring.pinned[producer]:
        return True
    size = tape.wiring.sizes[storage]
    if size == 0:
        return True
    if dies < idle.since and size >= tape.wiring.sizes[idle.storage]:
        return False
    fits = int(tape.live[dies + 1 : slot].max(initial=0)) + size <= budget_bytes
    return rng.random() < (0.8 if fits else 0.1)
