"""Make room at a step of a tape: move its op to a quieter place, or drop an idle copy and remake it later."""

from __future__ import annotations

from collections.abc import Container
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf
from random import Random

import numpy as np

from fxckpt.core.solvers.search.moves import Idle, idle_at, remake, remake_us, shift, window
from fxckpt.core.solvers.search.tape import EMPTY, Tape

_TRIES = 5
_SAMPLE = 8
_MOST_PRICED = 2_000_000  # copies that are priced before the greedy pass gives up


def make_room(tape: Tape, slot: int, limit_bytes: int, rng: Random) -> bool:
    """Drop an idle copy so that less is in use in `slot`, and nowhere more than `limit_bytes` or the peak so far.

    A few idle copies are drawn and tried in the order of the time it takes to remake them for what they free. Returns
    False, with the tape as it was, if none of them will do.
    """
    remakable, drawn = tape.wiring.remakable, []
    for _ in range(len(remakable)):
        storage = int(remakable[int(rng.random() * len(remakable))])
        if (idle := idle_at(tape, storage, slot)) is not None:
            drawn.append((remake_us(tape, idle) / _freed_bytes(tape, idle, limit_bytes), storage))
            if len(drawn) == _SAMPLE:
                break
    return any(_drop(tape, storage, slot, limit_bytes, rng) for _, storage in sorted(drawn)[:_TRIES])


def _freed_bytes(tape: Tape, idle: Idle, limit_bytes: int) -> int:
    """How much of what is over the limit goes with an idle copy, summed over the slots; its size if that is more."""
    size = tape.wiring.sizes[idle.storage]
    over = tape.live[idle.since + 1 : idle.until] - limit_bytes
    return max(int(np.clip(over, 0, size, out=over).sum()), size)


def _drop(tape: Tape, storage: int, slot: int, limit_bytes: int, rng: Random) -> bool:
    idle = idle_at(tape, storage, slot)
    if idle is None:
        return False
    before, most = int(tape.live[slot]), max(limit_bytes, tape.peak_bytes())
    mark = tape.mark()
    if remake(tape, idle, limit_bytes, rng) and int(tape.live[slot]) < before and tape.peak_bytes() <= most:
        return True
    tape.undo(mark)
    return False


def _price(tape: Tape, storage: int, slot: int, most_us: float) -> float:
    """Time to remake a storage that is idle in a slot, a byte [µs/B]; infinite if it can't be dropped."""
    idle = idle_at(tape, storage, slot)
    return inf if idle is None else remake_us(tape, idle, most_us) / tape.wiring.sizes[storage]


def relocate(tape: Tape, slot: int) -> bool:
    """Move the backward op in a slot to where less is in use, if that lowers the peak there and makes none as high."""
    if slot <= tape.split or tape.slots[slot] == EMPTY:
        return False
    low, high = window(tape, slot)
    quiet = (low + 1 + int(i) for i in np.argsort(tape.live[low + 1 : high], kind="stable"))
    before = int(tape.live[slot])
    for target in islice((other for other in quiet if tape.slots[other] == EMPTY), _TRIES):
        mark = tape.mark()
        shift(tape, slot, target)
        lower = int(tape.live[slot]) < before and tape.risen_bytes(exact=False) < before
        if lower and tape.risen_bytes() < before and int(tape.live[slot]) < before:
            return True
        tape.undo(mark)
    return False


def reach(
    tape: Tape,
    budget_bytes: int,
    rng: Random,
    *,
    forbidden: Container[int] = frozenset(),
    most_us: float = inf,
    noise: float = 0.0,
) -> bool:
    """Make room where most is in use, always for the least time, until the peak fits; False if it does not.

    A copy is priced when its turn comes, and again if it was not the cheapest then; until then its price is that of its
    last op alone, which is never more (lazy greedy, Minoux 1978). `forbidden` storages stay. A price is multiplied by a
    random factor between 1 - `noise` and 1. Gives up when the step takes `most_us` or more.
    """
    priced = 0
    while tape.peak_bytes() > budget_bytes and tape.step_us < most_us and priced < _MOST_PRICED:
        slot = int(tape.live.argmax())
        before = int(tape.live[slot])
        if relocate(tape, slot):
            priced += _TRIES
            continue
        queue = _queue(tape, slot, forbidden, rng, most_us=most_us - tape.step_us, noise=noise)
        priced += len(tape.wiring.remakable)
        while queue and tape.live[slot] > budget_bytes and tape.step_us < most_us:
            known, storage, factor = heappop(queue)
            price = factor * _price(tape, storage, slot, most_us - tape.step_us)
            if known < price < inf and queue and price > queue[0][0]:
                heappush(queue, (price, storage, factor))
            elif price < inf:
                _drop(tape, storage, slot, budget_bytes, rng)
        if int(tape.live[slot]) >= before:
            break
    return tape.peak_bytes() <= budget_bytes


def _queue(
    tape: Tape, slot: int, forbidden: Container[int], rng: Random, *, most_us: float, noise: float
) -> list[tuple[float, int, float]]:
    """The storages that are live in a slot and wanted later, as a heap: (least price, storage, random factor).

    Without those that take more than `most_us` to remake in any case.
    """
    remakable, prices, least_us = tape.wiring.remakable, tape.wiring.least_prices, tape.wiring.least_us
    queue = []
    for storage in remakable[(tape.first_birth[remakable] < slot) & (tape.last_read[remakable] > slot)].tolist():
        if storage not in forbidden:
            factor = 1 - noise * rng.random() if noise else 1.0
            if least_us[storage] <= most_us:
                queue.append((factor * prices[storage], storage, factor))
    heapify(queue)
    return queue
