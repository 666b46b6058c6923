"""One or several neighbouring segments taken as one: their part of the step, and what it can cost.

A block's part of the step is a `Graph` of its own, so a simulation says what each choice of kept storages costs in
memory. Equal parts (same ops on the same shapes, wired alike) are solved once. What the chain counts elsewhere weighs
nothing in them: the block's inputs, pinned storages and outputs of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from fxckpt.core.graph import Graph, Op, Storage, StorageKind
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Timeline, walk
from fxckpt.core.solvers.keep import closure, recomputing
from fxckpt.core.solvers.mincut import KeepProblem
from fxckpt.core.solvers.segments import Segments, backward_lives


@dataclass(frozen=True)
class Choice:
    """One choice of what a block keeps from its forward to its backward, and what that costs.

    Attributes:
        kept: the storages, numbered within the block.
        kept_bytes: bytes held between forward and backward, the boundary behind the block included [B].
        forward_peak_bytes, backward_peak_bytes: most bytes of the block's own at any step of its forward and of its
            backward, gradients that flow in and out and its parameters' gradients included [B].
        first_us: time of what backward repeats [µs].
        again_us: the same, and the time to run forward once more [µs].
    """

    kept: frozenset[int]
    kept_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    first_us: float
    again_us: float

    def dominates(self, other: Choice) -> bool:
        """Whether it is nowhere worse."""
        return (
            self.kept_bytes <= other.kept_bytes
            and self.forward_peak_bytes <= other.forward_peak_bytes
            and self.backward_peak_bytes <= other.backward_peak_bytes
            and self.first_us <= other.first_us
            and self.again_us <= other.again_us
        )


@dataclass(frozen=True, eq=False)
class Block:
    """The part of a step that belongs to some neighbouring segments.

    Storages are numbered within the block.

    Attributes:
        ops: forward ops, then backward ops, as they stand in the whole graph.
        wiring: for each of them what it reads and writes.
        storages: bytes and kind of each storage; what comes from before the block and what is held weighs nothing.
        numbers: for each storage its number in the whole graph.
        forward_count: number of forward ops.
        behind: storages that cross the cut behind the block.
        leaving: what flows on to the backward of earlier segments, and what stays.
        held: storages that its forward writes and that are kept whatever is chosen: pinned ones and outputs.
        inflow_bytes: what flows into its backward from behind [B].
        twice_bytes: the part of it that flows past the last segment, so the chain counts it too [B].
    """

    ops: tuple[Op, ...]
    wiring: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    storages: tuple[tuple[int, StorageKind], ...]
    numbers: tuple[int, ...]
    forward_count: int
    behind: tuple[int, ...]
    leaving: tuple[int, ...]
    held: frozenset[int]
    inflow_bytes: int
    twice_bytes: int

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for blocks that are alike."""
        ops = tuple((op.signature or op.target, op.time_us, op.pinned) for op in self.ops)
        counts = self.forward_count, self.inflow_bytes, self.twice_bytes
        return (ops, self.wiring, self.storages, counts, self.behind, self.leaving, self.held)

    @cached_property
    def part(self) -> Graph:
        """As a step of its own: backward ops stand between two that stand for the rest of the step.

        The first of these reads `behind`, the last one `leaving`.
        """
        moved = [
            replace(op, reads=reads, writes=writes, replay=())
            for op, (reads, writes) in zip(self.ops, self.wiring, strict=True)
        ]
        forward, backward = moved[: self.forward_count], moved[self.forward_count :]
        before, after = Op("behind", "behind", self.behind, ()), Op("after", "after", self.leaving, ())
        return Graph(
            ops=(*forward, before, *backward, after),
            storages=tuple(Storage("", size_bytes, kind) for size_bytes, kind in self.storages),
            forward_count=self.forward_count,
        )

    @cached_property
    def _again(self) -> Graph:
        """The part when its forward has run before: what is held is there."""
        storages = [replace(s, kind="input") if i in self.held else s for i, s in enumerate(self.part.storages)]
        ops = tuple(replace(op, ordered=False) if op.ordered else op for op in self.part.ops)
        return replace(self.part, ops=ops, storages=tuple(storages))

    def forward_only(self) -> tuple[float, int]:
        """Time [µs] and peak [B] of making `behind` from the block's inputs once more, nothing else kept."""
        ops = closure(self.part, self.behind, self.held)
        timeline = walk(self._again, Schedule((*ops, self.part.forward_count), len(ops)))
        return self._time_us(ops), _peak(timeline, 0, len(ops))

    def backward_only(self) -> tuple[float, int]:
        """Time [µs] and peak [B] of what backward repeats if only the block's inputs are there when it starts."""
        backward = range(self.part.forward_count + 1, len(self.part.ops))
        order = recomputing(self.part, backward, self.held)
        timeline = walk(self._again, Schedule(tuple(order), 0))
        return self._time_us(order) - self._time_us(backward), timeline.peak_bytes - self.twice_bytes

    def choices(self, most: int) -> tuple[Choice, ...]:
        """About `most` choices worth considering, none of them dominated by another."""
        hull = KeepProblem(self.part, {*self.behind, *self.held}).hull(most)
        found: list[Choice] = []
        for choice in map(self.evaluate, hull):
            if not any(other.dominates(choice) for other in found):
                found = [other for other in found if not choice.dominates(other)]
                found.append(choice)
        return tuple(found)

    def evaluate(self, kept: frozenset[int]) -> Choice:
        """What it costs to keep `kept`."""
        count = self.part.forward_count
        live = {*kept, *self.behind, *self.held}
        order = (*range(count), *recomputing(self.part, range(count, len(self.part.ops)), live))
        timeline = walk(self.part, Schedule(order, count))
        return Choice(
            kept=kept,
            kept_bytes=timeline.saved_bytes,
            forward_peak_bytes=_peak(timeline, 0, count),
            backward_peak_bytes=_peak(timeline, count, len(order)) - self.twice_bytes,
            first_us=timeline.recompute_us,
            again_us=timeline.recompute_us + self._time_us(closure(self.part, live, self.held)),
        )

    def _time_us(self, ops: Iterable[int]) -> float:
        return sum(self.part.ops[i].time_us for i in ops)


def _peak(timeline: Timeline, start: int, end: int) -> int:
    return int(timeline.live_bytes[start:end].max(initial=0))


class Blocks:
    """Makes the blocks of a cutting."""

    def __init__(self, graph: Graph, segments: Segments) -> None:
        self.graph = graph
        self.segments = segments
        self._lives = backward_lives(graph)
        self._flows: dict[int, tuple[int, ...]] = {}
        self._staying = frozenset() if graph.gradients_allocated else frozenset(graph.gradients)
        self._held = segments.pinned | frozenset(graph.outputs)
        self._last_read = {s: i for i, op in enumerate(graph.plain_ops) for s in op.reads}

    def flow(self, index: int) -> tuple[int, ...]:
        """Storages that flow through backward cut `index`."""
        if index not in self._flows:
            position = self.segments.backward_cuts[index]
            self._flows[index] = tuple(s for s, (born, dies) in self._lives.items() if born < position <= dies)
        return self._flows[index]

    def passing(self, first: int, last: int) -> frozenset[int]:
        """Storages that flow past the backward of segments `first` to `last` without being read there."""
        return frozenset(self.flow(last + 1)) - {s for op in self._backward(first, last) for s in op.reads}

    def rest_bytes(self) -> list[int]:
        """For each segment the bytes that are there during its backward whatever is decided, outside of its block.

        These are gradients that stay, pinned storages that are still needed, and what flows past.
        """
        pinned_bytes = [self.graph.bytes_of(self.held(i)) for i in range(len(self.segments))]
        rest = []
        gradient_bytes = 0
        for index in reversed(range(len(self.segments))):
            passing_bytes = self.graph.bytes_of(self.passing(index, index))
            rest.append(gradient_bytes + sum(pinned_bytes[: index + 1]) + passing_bytes)
            made = (s for op in self._backward(index, index) for s in op.writes)
            gradient_bytes += self.graph.bytes_of(s for s in made if s in self._staying)
        return rest[::-1]

    def lasting_bytes(self) -> int:
        """Bytes of outputs, and of pinned storages that are read after the backward of their segments [B]."""
        held = {s for op in self.graph.ops[: self.graph.forward_count] for s in op.writes} & self._held
        return self.graph.bytes_of(held - {s for i in range(len(self.segments)) for s in self.held(i)})

    def held(self, index: int) -> tuple[int, ...]:
        """Pinned storages that a segment writes and that nothing reads after its backward."""
        pinned = [s for op in self._forward(index, index) for s in op.writes if s in self.segments.pinned]
        end = self.segments.backward_cuts[index]
        return tuple(s for s in pinned if s not in self.graph.outputs and self._last_read.get(s, 0) < end)

    def _forward(self, first: int, last: int) -> tuple[Op, ...]:
        return self.graph.ops[self.segments.forward_cuts[first] : self.segments.forward_cuts[last + 1]]

    def _backward(self, first: int, last: int) -> tuple[Op, ...]:
        return self.graph.ops[self.segments.backward_cuts[last + 1] : self.segments.backward_cuts[first]]

    def block(self, first: int, last: int) -> Block:
        """The block of segments `first` to `last`, both included."""
        forward, backward = self._forward(first, last), self._backward(first, last)
        behind, passing = self.segments.boundaries[last + 1], self.passing(first, last)
        inflow = [s for s in self.flow(last + 1) if s not in passing]
        staying = [s for op in backward for s in op.writes if s in self._staying]
        leaving = dict.fromkeys((*(s for s in self.flow(first) if s not in passing), *staying))
        made = [s for op in forward for s in op.writes]

        ops = (*forward, *backward)
        mentioned = [s for op in ops for s in (*op.reads, *op.writes)]
        numbers = {s: i for i, s in enumerate(dict.fromkeys((*mentioned, *behind, *inflow, *leaving)))}
        kinds: dict[int, StorageKind] = dict.fromkeys(made, "activation")
        kinds |= dict.fromkeys(inflow, "tangent")
        kinds |= {s: "backward" for op in backward for s in op.writes}
        weights = {s: 0 if s in self._held else self.graph.storages[s].size_bytes for s in kinds}

        def numbered(storages: Iterable[int]) -> tuple[int, ...]:
            return tuple([numbers[s] for s in storages])

        return Block(
            ops=ops,
            wiring=tuple((numbered(op.reads), numbered(op.writes)) for op in ops),
            storages=tuple((weights.get(s, 0), kinds.get(s, "input")) for s in numbers),
            numbers=tuple(numbers),
            forward_count=len(forward),
            behind=numbered(behind),
            leaving=numbered(leaving),
            held=frozenset(numbers[s] for s in made if s in self._held),
            inflow_bytes=self.graph.bytes_of(inflow),
            twice_bytes=self.graph.bytes_of(self.passing(last, last) - passing),
        )
