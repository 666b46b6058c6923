"""What to keep at a price per byte: a project-selection problem, solved exactly as a minimum cut.

One node for each forward op (1: it is repeated) and one for each storage it writes (1: backward needs it, or a repeated
op does). At price λ [µs/B] of keeping a byte, the cut of least capacity with these arcs is the cheapest choice:

    source → storage      ∞           backward reads it
    storage → its op      λ · bytes   needed and its op not repeated: it is kept
    op → what it reads    ∞           a repeated op needs its inputs
    op → sink             time        the op is repeated

Picard, "Maximal closure of a graph and applications to combinatorial problems" (1976); on rematerialization as a cut:
He and Yu, "Transcending runtime-memory tradeoffs in checkpointing by being fusion aware" (2023). The flow is found by
Dinic's algorithm; all breakpoints of λ on the lower hull by the recursion of Eisner and Severance (1976), in which each
cut is sought between its neighbours only: the higher the price, the more is repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from fxckpt.core.graph import Graph
from fxckpt.core.solvers.keep import closure

_SOURCE, _SINK = 0, 1


class Network:
    """A flow network with residual capacities. Nodes 0 and 1 are source and sink."""

    def __init__(self) -> None:
        self.heads: list[int] = []
        self.capacity: list[float] = []
        self.arcs: list[list[int]] = [[], []]

    def node(self) -> int:
        """Add a node."""
        self.arcs.append([])
        return len(self.arcs) - 1

    def arc(self, tail: int, head: int, capacity: float) -> None:
        """Add an arc; its reverse is the next one."""
        self.arcs[tail].append(len(self.heads))
        self.arcs[head].append(len(self.heads) + 1)
        self.heads += [head, tail]
        self.capacity += [capacity, 0.0]

    def source_side(self) -> list[bool]:
        """Find a maximum flow; for each node whether it can still be reached from the source: a minimum cut."""
        while (level := self._levels())[_SINK] >= 0:
            following = [0] * len(self.arcs)
            while self._augment(level, following):
                pass
        return [depth >= 0 for depth in level]

    def _levels(self) -> list[int]:
        heads, capacity, arcs = self.heads, self.capacity, self.arcs
        level = [-1] * len(arcs)
        level[_SOURCE] = 0
        queue = deque([_SOURCE])
        while queue:
            node = queue.popleft()
            for arc in arcs[node]:
                if capacity[arc] > 1e-9 and level[heads[arc]] < 0:
                    level[heads[arc]] = level[node] + 1
                    queue.append(heads[arc])
        return level

    def _augment(self, level: list[int], following: list[int]) -> bool:
        """Push flow along one shortest path, if there is one left."""
        heads, capacity = self.heads, self.capacity
        path: list[int] = []
        node = _SOURCE
        while node != _SINK:
            arcs, number, depth = self.arcs[node], following[node], level[node] + 1
            count = len(arcs)
            while number < count and not (capacity[arcs[number]] > 1e-9 and level[heads[arcs[number]]] == depth):
                number += 1
            following[node] = number
            if number < count:
                path.append(arcs[number])
                node = heads[arcs[number]]
                continue
            if not path:
                return False
            node = heads[path.pop() ^ 1]
            following[node] += 1
        flow = min([capacity[arc] for arc in path])
        for arc in path:
            capacity[arc] -= flow
            capacity[arc ^ 1] += flow
        return True


class KeepProblem:
    """Which forward storages of a graph to keep.

    Args:
        graph: the step, or a part of it.
        free: storages that are there anyway.
    """

    def __init__(self, graph: Graph, free: Collection[int]) -> None:
        self.graph = graph
        self.free = free
        self.read_back = frozenset(s for op in graph.backward_ops for s in op.reads if self._costs(s))
        self.ops = frozenset(closure(graph, self.read_back, free))
        self._reads = {op: [s for s in graph.ops[op].reads if self._costs(s)] for op in sorted(self.ops)}

    def _costs(self, storage: int) -> bool:
        return 0 <= self.graph.producer[storage] < self.graph.forward_count and storage not in self.free

    def repeated_at(
        self, price: float, *, at_least: frozenset[int] = frozenset(), at_most: frozenset[int] | None = None
    ) -> frozenset[int]:
        """The ops to repeat at a price per byte [µs/B].

        Args:
            price: of keeping a byte.
            at_least, at_most: what is best at a lower and at a higher price. Divided by the price, all capacities but
                those of arcs into the sink stay the same, so the higher the price the more is repeated, and only what
                lies between is open (Gallo, Grigoriadis and Tarjan 1989).
        """
        graph, network = self.graph, Network()
        open_ops = sorted((self.ops if at_most is None else at_most) - at_least)
        op_node = {op: network.node() for op in open_ops}
        needed, storage_node = self.needed(at_least), dict[int, int]()
        for storage in dict.fromkeys(s for op in open_ops for s in (*graph.ops[op].writes, *self._reads[op])):
            producer = graph.producer[storage]
            if producer in at_least or (storage in needed and producer not in op_node):
                continue  # there anyway
            node = storage_node[storage] = network.node()
            network.arc(node, op_node.get(producer, _SINK), price * graph.storages[storage].size_bytes)
            if storage in needed:
                network.arc(_SOURCE, node, float("inf"))
        for op, node in op_node.items():
            network.arc(node, _SINK, graph.ops[op].time_us)
            for storage in self._reads[op]:
                if storage in storage_node:
                    network.arc(node, storage_node[storage], float("inf"))
        reached = network.source_side()
        return at_least.union(op for op, node in op_node.items() if reached[node])

    def needed(self, repeated: Collection[int]) -> frozenset[int]:
        """What backward and repeated ops read."""
        return self.read_back.union(*(self._reads[op] for op in repeated))

    def kept(self, repeated: Collection[int]) -> frozenset[int]:
        """The storages to keep if these ops are repeated."""
        return frozenset(s for s in self.needed(repeated) if self.graph.producer[s] not in repeated)

    def keep_at(self, price: float) -> frozenset[int]:
        """The storages to keep at a price per byte [µs/B]."""
        return self.kept(self.repeated_at(price))

    def cost(self, kept: frozenset[int]) -> tuple[int, float]:
        """Bytes kept [B] and time of what is repeated [µs]."""
        again = closure(self.graph, self.read_back, {*kept, *self.free})
        return self.graph.bytes_of(kept), sum(self.graph.ops[op].time_us for op in again)

    def hull(self, most: int) -> list[frozenset[int]]:
        """The choices that are cheapest at some price, from keeping least to keeping most; at most about `most`."""
        nothing = frozenset[int]()
        found = {self.ops: self._cost(self.ops), nothing: self._cost(nothing)}
        gaps = deque([(self.ops, nothing)])
        while gaps and len(found) < most:
            low, high = gaps.popleft()
            more_bytes = found[high][0] - found[low][0]
            saved_us = found[low][1] - found[high][1]
            if more_bytes <= 0 or saved_us <= 0:
                continue
            price = saved_us / more_bytes
            middle = self.repeated_at(price, at_least=high, at_most=low)
            if middle in found:
                continue
            found[middle] = self._cost(middle)
            line = found[low][1] + price * found[low][0]
            if found[middle][1] + price * found[middle][0] < line * (1 - 1e-9):
                gaps += [(low, middle), (middle, high)]
        return [self.kept(ops) for ops in sorted(found, key=lambda ops: (found[ops], sorted(ops)))]

    def _cost(self, repeated: frozenset[int]) -> tuple[int, float]:
        """Bytes kept [B] and time [µs] if these ops are repeated."""
        return self.graph.bytes_of(self.kept(repeated)), sum(self.graph.ops[op].time_us for op in sorted(repeated))
