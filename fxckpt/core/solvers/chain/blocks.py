"""One or several neighbouring segments taken as one: their part of the step, and what it can cost.

A block's part of the step is a `Graph` of its own, so `simulate` says what each choice of kept storages costs in
memory. Equal parts (same ops on the same shapes, wired alike) are solved once. What the chain counts elsewhere weighs
nothing in them: the block's inputs, pinned storages and outputs of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from fxckpt.core.graph import Graph, Op, Storage, StorageKind
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Timeline, simulate
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


@dataclass(frozen=True)
class Block:
    """The part of a step that belongs to some neighbouring segments.

    Attributes:
        part: forward ops, then backward ops between two that stand for the rest of the step: the first reads
            `behind`, the last reads what flows on to earlier segments and what stays.
        numbers: for each storage of `part` its number in the whole graph.
        behind: storages that cross the cut behind the block, numbered within it.
        held: storages that its forward writes and that are kept whatever is chosen: pinned ones and outputs.
        inflow_bytes: what flows into its backward from behind [B].
        twice_bytes: the part of it that flows past the last segment, so the chain counts it too [B].
    """

    part: Graph
    numbers: tuple[int, ...]
    behind: tuple[int, ...]
    held: frozenset[int]
    inflow_bytes: int
    twice_bytes: int

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for blocks that are alike."""
        ops = tuple((op.signature or op.target, op.reads, op.writes, op.time_us, op.pinned) for op in self.part.ops)
        sizes = tuple((s.size_bytes, s.kind) for s in self.part.storages)
        return (ops, sizes, self.part.forward_count, self.behind, self.held, self.inflow_bytes, self.twice_bytes)

    @cached_property
    def _again(self) -> Graph:
        """The part when its forward has run before: what is held is there."""
        storages = [replace(s, kind="input") if i in self.held else s for i, s in enumerate(self.part.storages)]
        ops = tuple(replace(op, ordered=False) for op in self.part.ops)
        return replace(self.part, ops=ops, storages=tuple(storages))

    def forward_only(self) -> tuple[float, int]:
        """Time [µs] and peak [B] of making `behind` from the block's inputs once more, nothing else kept."""
        ops = closure(self.part, self.behind, self.held)
        timeline = simulate(self._again, Schedule((*ops, self.part.forward_count), len(ops)))
        return self._time_us(ops), _peak(timeline, 0, len(ops))

    def backward_only(self) -> tuple[float, int]:
        """Time [µs] and peak [B] of what backward repeats if only the block's inputs are there when it starts."""
        backward = range(self.part.forward_count + 1, len(self.part.ops))
        order = recomputing(self.part, backward, self.held)
        timeline = simulate(self._again, Schedule(tuple(order), 0))
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
        timeline = simulate(self.part, Schedule(order, count))
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

        mentioned = [s for op in (*forward, *backward) for s in (*op.reads, *op.writes)]
        numbers = {s: i for i, s in enumerate(dict.fromkeys((*mentioned, *behind, *inflow, *leaving)))}
        kinds: dict[int, StorageKind] = dict.fromkeys(made, "activation")
        kinds |= dict.fromkeys(inflow, "tangent")
        kinds |= {s: "backward" for op in backward for s in op.writes}
        before = Op("behind", "behind", tuple(numbers[s] for s in behind), ())
        after = Op("after", "after", tuple(numbers[s] for s in leaving), ())
        part = Graph(
            ops=(*_moved(forward, numbers), before, *_moved(backward, numbers), after),
            storages=tuple(self._part_storage(s, kinds.get(s, "input")) for s in numbers),
            forward_count=len(forward),
        )
        return Block(
            part=part,
            numbers=tuple(numbers),
            behind=before.reads,
            held=frozenset(numbers[s] for s in made if s in self._held),
            inflow_bytes=self.graph.bytes_of(inflow),
            twice_bytes=self.graph.bytes_of(self.passing(last, last) - passing),
        )

    def _part_storage(self, storage: int, kind: StorageKind) -> Storage:
        """A storage as it counts in a part: what comes from before the block and what is held weighs nothing."""
        weightless = kind == "input" or storage in self._held
        return Storage("", 0 if weightless else self.graph.storages[storage].size_bytes, kind)


def _moved(ops: tuple[Op, ...], numbers: dict[int, int]) -> list[Op]:
    return [
        replace(op, reads=tuple(numbers[s] for s in op.reads), writes=tuple(numbers[s] for s in op.writes), replay=())
        for op in ops
    ]
