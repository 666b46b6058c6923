"""Where to cut the training step: positions in forward that few storages cross, and their counterparts in backward.

Between two cuts lies a segment. What crosses a cut must be kept (or made again from the cut before); storages that are
read far from where they are written, such as a U-Net's skips, would cross every cut between, so they are pinned: kept
from their first writing to their last reading, whatever else is decided.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from fxckpt.core.graph import Graph
from fxckpt.core.solvers.keep import pinned_storages

Where = Literal["read", "unread", "any"]
_READ: dict[Where, set[bool]] = {"read": {True}, "unread": {False}, "any": {True, False}}


@dataclass(frozen=True)
class Segments:
    """A cutting of the step into `len(self)` segments.

    Attributes:
        forward_cuts: segment i is forward ops `forward_cuts[i]` up to `forward_cuts[i + 1]`.
        backward_cuts: its backward is ops `backward_cuts[i + 1]` up to `backward_cuts[i]`.
        boundaries: `boundaries[i]` holds the storages that cross forward cut i, pinned ones left out.
        pinned: storages that are kept from their first writing to their last reading.
    """

    forward_cuts: tuple[int, ...]
    backward_cuts: tuple[int, ...]
    boundaries: tuple[tuple[int, ...], ...]
    pinned: frozenset[int]

    def __len__(self) -> int:
        return len(self.forward_cuts) - 1

    def merged(self, most: int) -> Segments:
        """The same with neighbours merged evenly until there are no more than `most` segments."""
        count = len(self)
        if count <= most:
            return self
        chosen = sorted({round(i * count / most) for i in range(most + 1)})
        return Segments(
            tuple(self.forward_cuts[i] for i in chosen),
            tuple(self.backward_cuts[i] for i in chosen),
            tuple(self.boundaries[i] for i in chosen),
            self.pinned,
        )


def cut(
    graph: Graph,
    *,
    width: int = 1,
    where: Where = "read",
    longest_ops: int = 0,
    pinned: frozenset[int] = frozenset(),
) -> Segments:
    """Cut a step into segments.

    Args:
        graph: the training step.
        width: how many storages may cross a cut.
        where: cut where what crosses is all "read" by backward, where none of it is ("unread"), or at "any" place.
        longest_ops: pin long-lived storages until no segment has more forward ops than this, if that is possible;
            0 pins none.
        pinned: storages to pin in any case.
    """
    pinned |= pinned_storages(graph)
    reach = _forward_reach(graph)
    cuts = _forward_cuts(graph, reach, pinned, width, where)
    while longest_ops:
        long = _longest_storage(reach, cuts, pinned, longest_ops)
        if long is None:
            break
        pinned |= {long}
        cuts = _forward_cuts(graph, reach, pinned, width, where)
    return _with_backward(graph, reach, cuts, pinned)


def _forward_reach(graph: Graph) -> dict[int, tuple[int, int]]:
    """For each storage that one forward op writes and another reads: index of the writer and of the last reader."""
    outputs = frozenset(graph.outputs)
    reach: dict[int, tuple[int, int]] = {}
    for index, op in enumerate(graph.ops[: graph.forward_count]):
        for storage in op.reads:
            if graph.producer[storage] >= 0 and storage not in outputs:
                reach[storage] = graph.producer[storage], index
    return reach


def _forward_cuts(
    graph: Graph, reach: dict[int, tuple[int, int]], pinned: Collection[int], width: int, where: Where
) -> dict[int, tuple[int, ...]]:
    """Positions to cut at, and what crosses there; the first of several neighbours that the same storages cross."""
    read_back = {s for op in graph.backward_ops for s in op.reads}
    starts: list[list[int]] = [[] for _ in range(graph.forward_count + 1)]
    for storage, (written, _) in reach.items():
        if storage not in pinned:
            starts[written + 1].append(storage)
    cuts: dict[int, tuple[int, ...]] = {0: ()}
    alive: set[int] = set()
    previous: tuple[int, ...] = ()
    for position in range(1, graph.forward_count):
        alive = {s for s in alive if reach[s][1] >= position} | {s for s in starts[position] if reach[s][1] >= position}
        across = tuple(sorted(alive))
        read = {s in read_back for s in across}
        if len(across) <= width and read <= _READ[where] and across != previous:
            cuts[position] = across
            previous = across
    cuts[graph.forward_count] = ()
    return cuts


def _longest_storage(
    reach: dict[int, tuple[int, int]], cuts: dict[int, tuple[int, ...]], pinned: Collection[int], longest_ops: int
) -> int | None:
    """The storage that lives longest inside a segment that has too many ops, if it spans half of that segment."""
    best = (0, 0)
    for start, end in pairwise(sorted(cuts)):
        if end - start > longest_ops:
            for storage, (written, read) in reach.items():
                inside = min(read, end) - max(written, start)
                if storage not in pinned and 2 * inside >= end - start:
                    best = max(best, (inside, -storage))
    return -best[1] if best[0] else None


def _with_backward(
    graph: Graph, reach: dict[int, tuple[int, int]], cuts: dict[int, tuple[int, ...]], pinned: frozenset[int]
) -> Segments:
    """Find for each forward cut its counterpart in backward; drop cuts that have none.

    All that reads what only later segments hold must come before it, all that reads what only earlier ones hold after
    it. Of the positions left, take the one where fewest bytes flow back.
    """
    earliest, latest = _backward_limits(graph, reach, pinned)
    flow_bytes = _backward_flow(graph)
    found: list[tuple[int, int, tuple[int, ...]]] = [(graph.forward_count, graph.forward_count, ())]
    for position in sorted(cuts)[-2:0:-1]:
        low, high = max(latest[position] + 1, found[-1][1]), earliest[position]
        if low <= high:
            best = min(range(low, high + 1), key=lambda i: (flow_bytes[i], i))
            found.append((position, best, cuts[position]))
    found.append((0, graph.plain_count, ()))
    forward_cuts, backward_cuts, boundaries = zip(*reversed(found), strict=True)
    return Segments(forward_cuts, backward_cuts, boundaries, pinned)


def _backward_limits(
    graph: Graph, reach: dict[int, tuple[int, int]], pinned: Collection[int]
) -> tuple[list[int], list[int]]:
    """For each forward position p: the first backward op that reads what is used up before p in forward, and the last
    one that reads what is written at p or later."""
    count, end = graph.forward_count, graph.plain_count
    first, last = [end] * (count + 1), [count - 1] * (count + 1)
    free = {*pinned, *graph.outputs}
    for index in range(count, end):
        for storage in graph.ops[index].reads:
            written = graph.producer[storage]
            if 0 <= written < count and storage not in free:
                used_up = reach[storage][1] if storage in reach else written
                first[used_up + 1] = min(first[used_up + 1], index)
                last[written] = max(last[written], index)
    for position in range(1, count + 1):
        first[position] = min(first[position], first[position - 1])
    for position in range(count - 1, -1, -1):
        last[position] = max(last[position], last[position + 1])
    return first, last


def _backward_flow(graph: Graph) -> list[int]:
    """For each backward position the bytes of storages, gradients left out, that are written before and read after."""
    change = [0] * (graph.plain_count + 2)
    for storage, (born, dies) in backward_lives(graph).items():
        change[born + 1] += graph.storages[storage].size_bytes
        change[dies + 1] -= graph.storages[storage].size_bytes
    return list(accumulate(change))[:-1]


def backward_lives(graph: Graph) -> dict[int, tuple[int, int]]:
    """For each storage of backward that is read, gradients left out: index of its writer and of its last reader."""
    gradients = frozenset(graph.gradients)
    lives: dict[int, tuple[int, int]] = {}
    for index in range(graph.forward_count, graph.plain_count):
        for storage in graph.ops[index].reads:
            kind = graph.storages[storage].kind
            if kind == "tangent":
                lives[storage] = graph.forward_count - 1, index
            elif kind == "backward" and storage not in gradients:
                lives[storage] = graph.producer[storage], index
    return lives
