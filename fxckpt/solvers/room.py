"""Make room at a step of a tape: drop an idle copy that is live there, and remake it when it is needed again."""

from __future__ import annotations

from random import Random

from fxckpt.solvers.moves import Idle, idle_at, remake, remake_us
from fxckpt.solvers.tape import Tape

_TRIES = 5


def make_room(tape: Tape, slot: int, limit_bytes: int, rng: Random, *, noise: float = 0.0) -> bool:
    """Drop one idle copy so that less is in use in `slot`, and nowhere more than `limit_bytes` or the peak so far.

    Copies are tried in the order of the time it takes to remake them for their bytes, each times a random factor
    between 1 - `noise` and 1. Returns False, with the tape as it was, if none of the first few will do.
    """
    before, most = int(tape.live[slot]), max(limit_bytes, tape.peak_bytes())
    for _, _, idle in _candidates(tape, slot, rng, noise)[:_TRIES]:
        mark = tape.mark()
        if remake(tape, idle, limit_bytes, rng) and int(tape.live[slot]) < before and tape.peak_bytes() <= most:
            return True
        tape.undo(mark)
    return False


def _candidates(tape: Tape, slot: int, rng: Random, noise: float) -> list[tuple[float, int, Idle]]:
    """Idle copies over a slot, the one cheapest to remake for its size first."""
    sizes, found = tape.wiring.sizes, []
    for storage in tape.wiring.remakable:
        idle = idle_at(tape, storage, slot)
        if idle is not None:
            cost = remake_us(tape, idle, float("inf")) / sizes[storage]
            found.append((cost * (1 - noise * rng.random()), storage, idle))
    found.sort(key=lambda candidate: candidate[:2])
    return found


def reach(tape: Tape, budget_bytes: int, rng: Random) -> None:
    """Make room at the peak, always for the least time, until the peak fits the budget or no more can be done."""
    for _ in range(4 * len(tape.slots)):
        if tape.peak_bytes() <= budget_bytes or not make_room(tape, int(tape.live.argmax()), budget_bytes, rng):
            break
    tape.commit()
