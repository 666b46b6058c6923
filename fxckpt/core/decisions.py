"""What a schedule does with each tensor that forward computes, and why.

A schedule says only which ops stand twice. Here that is read back as decisions about storages, with a reason that the
graph itself gives: the time to repeat set against the bytes that repeating frees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.simulate import Timeline
from fxckpt.units import format_bytes, format_us

Action = Literal["keep", "recompute", "restore", "discard"]
Cause = Literal[
    "output",
    "pinned",
    "nested",
    "checkpoint",
    "fits",
    "costly",
    "step",
    "cheap",
    "demanded",
    "restored",
    "update",
    "unread",
]

_TEXTS: dict[Cause, str] = {
    "output": "an output of the model",
    "pinned": "pinned: {detail}",
    "nested": "kept at first, remade later",
    "checkpoint": "others are remade from it",
    "fits": "it fits",
    "costly": "costly: {time} for {bytes}",
    "step": "a step in remaking others",
    "cheap": "cheap: {time} frees {bytes}",
    "demanded": "to fit: {time} frees {bytes}",
    "restored": "brought back by {detail}",
    "update": "a buffer's new value",
    "unread": "backward does not read it",
}
"""Short: the last column of a wide table. Costly: to repeat it would take so long, and free so many bytes."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one storage that forward writes.

    Attributes:
        action: "keep" from forward to backward, "recompute" in backward, "restore" by another op than the one that made
            it first, or "discard": backward does not need it.
        runs: how often the op that writes it runs in a step.
        cause: why, as a word.
        repeat_us: time to repeat what writes it, and what that needs and the plan does not have at hand; or to restore
            it [µs].
        freed_bytes: bytes that not keeping it frees, together with what the same op writes [B].
        detail: more about the cause, such as why an op is pinned.
    """

    action: Action
    runs: int
    cause: Cause
    repeat_us: float = 0.0
    freed_bytes: int = 0
    detail: str = ""

    @property
    def reason(self) -> str:
        """Why, in words."""
        return reason(self.cause, self.repeat_us, self.freed_bytes, self.detail)


def reason(cause: Cause, repeat_us: float, freed_bytes: int, detail: str = "") -> str:
    """A cause in words, with times and bytes."""
    return _TEXTS[cause].format(time=format_us(repeat_us), bytes=format_bytes(freed_bytes), detail=detail)


def decisions(timeline: Timeline, baseline: Timeline) -> dict[int, Decision]:
    """For each storage that a forward op writes (an index into `Graph.storages`), what is done with it.

    Args:
        timeline: the simulated schedule.
        baseline: the simulated plain step, which says what a byte is worth.
    """
    facts = _Facts(timeline, baseline)
    graph = timeline.graph
    written = (s for op in graph.ops[: graph.forward_count] for s in op.writes)
    return {storage: _decide(facts, storage) for storage in sorted(written)}


@dataclass(frozen=True)
class _Facts:
    """What decisions are derived from, collected once a schedule."""

    timeline: Timeline
    baseline: Timeline

    @property
    def graph(self) -> Graph:
        return self.timeline.graph

    @cached_property
    def repeats(self) -> dict[int, int]:
        return self.timeline.schedule.repeats()

    @cached_property
    def saved(self) -> frozenset[int]:
        return frozenset(self.timeline.saved)

    @cached_property
    def remade(self) -> frozenset[int]:
        """Storages of which a recomputed copy is read."""
        return frozenset(x.storage for x in self.timeline.lifetimes if x.recomputed and x.dies > x.born)

    @cached_property
    def restored(self) -> dict[int, int]:
        """Storages that alternatives write, and the last of these that runs."""
        ran = (i for i in self.timeline.schedule.order if i >= self.graph.plain_count)
        return {s: i for i in ran for s in self.graph.ops[i].writes if self.graph.producer[s] >= 0}

    @cached_property
    def read_by_backward(self) -> frozenset[int]:
        return frozenset(s for op in self.graph.backward_ops for s in op.reads)

    @cached_property
    def us_per_byte(self) -> float:
        """The plain model's price: time of forward for a byte that it saves. Dearer than this is called costly."""
        forward_us = sum(op.time_us for op in self.graph.ops[: self.graph.forward_count])
        return forward_us / max(self.baseline.saved_bytes, 1)

    def remake(self, storage: int) -> Remake:
        """What it would take to remake a storage instead of keeping it, all else as scheduled."""
        at_hand = (self.saved | self.remade | frozenset(self.graph.outputs)) - {storage}
        waiting, needed = [storage], set[int]()
        while waiting:
            current = waiting.pop()
            producer = self.graph.producer[current]
            if current in at_hand or producer < 0 or producer in needed or producer in self.repeats:
                continue
            if self.graph.storages[current].kind not in RESIDENT:
                needed.add(producer)
                waiting.extend(self.graph.ops[producer].reads)
        return Remake(self.graph, tuple(sorted(needed)))


@dataclass(frozen=True)
class Remake:
    """The ops to repeat for one storage."""

    graph: Graph
    ops: tuple[int, ...]

    @property
    def time_us(self) -> float:
        """Time of these ops [µs]."""
        return sum(self.graph.ops[i].time_us for i in self.ops)

    def pinned(self, storage: int) -> str:
        """Why it can't be done, or ""."""
        stuck = [self.graph.ops[index] for index in self.ops if self.graph.ops[index].pinned]
        own = next((op.pinned for op in stuck if storage in op.writes), "")
        return own or next((f"needs {op.name}: {op.pinned}" for op in stuck), "")


def _decide(facts: _Facts, storage: int) -> Decision:
    producer = facts.graph.producer[storage]
    runs = 1 + facts.repeats.get(producer, 0)
    if storage in facts.graph.outputs:
        return Decision("keep", runs, "output")
    if storage in facts.saved:
        return _kept(facts, storage, runs)
    if storage in facts.remade:
        return _recomputed(facts, storage, runs)
    if storage in facts.restored:
        op = facts.graph.ops[facts.restored[storage]]
        return Decision("restore", runs, "restored", op.time_us, facts.graph.bytes_of((storage,)), op.name)
    return Decision("discard", runs, "update" if storage in facts.graph.updates else "unread")


def _kept(facts: _Facts, storage: int, runs: int) -> Decision:
    remake = facts.remake(storage)
    beside = (s for s in facts.graph.ops[facts.graph.producer[storage]].writes if s in facts.saved)
    repeat_us, freed_bytes = remake.time_us, facts.graph.bytes_of(beside)
    pinned = remake.pinned(storage)
    cause: Cause
    if pinned:
        cause = "pinned"
    elif storage in facts.remade:
        cause = "nested"
    elif storage not in facts.read_by_backward:
        cause = "checkpoint"
    elif facts.repeats and repeat_us > facts.us_per_byte * freed_bytes:
        cause = "costly"
    else:
        cause = "fits"
    return Decision("keep", runs, cause, repeat_us, freed_bytes, pinned)


def _recomputed(facts: _Facts, storage: int, runs: int) -> Decision:
    op = facts.graph.ops[facts.graph.producer[storage]]
    repeat_us = op.time_us * (runs - 1)
    beside = (s for s in op.writes if s in facts.remade and s in facts.read_by_backward and s not in facts.saved)
    freed_bytes = facts.graph.bytes_of(beside)
    cause: Cause
    if storage not in facts.read_by_backward:
        cause = "step"
    elif repeat_us <= facts.us_per_byte * freed_bytes:
        cause = "cheap"
    else:
        cause = "demanded"
    return Decision("recompute", runs, cause, repeat_us, freed_bytes)
