"""What edits of a schedule need to know of a graph."""

from __future__ import annotations

from fxckpt.core.arrays import integers
from fxckpt.core.graph import RESIDENT, Graph


class Wiring:
    """What edits need to know of a graph, as lists: made once, shared by all tapes of the graph.

    Schedules of plain ops only: alternatives are not looked at, and stand in the lists to keep the numbers.

    Attributes:
        reads, writes: for each op the storages that it reads and writes, without those that are always there.
        sizes: bytes of each storage [B].
        producer: for each storage the op that writes it, or -1 (a tangent).
        dependents: for each op the ops that read what it writes.
        remakable: storages with a size whose producer may be repeated, as an array.
        least_us, least_prices: for each of them what it takes to remake it at least [µs], and by its size [µs/B].
        anchored: whether the first backward step matters, whatever it is, to what tangents and gradients take.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        resident = [s.kind in RESIDENT for s in graph.storages]
        self.sizes = [s.size_bytes for s in graph.storages]
        self.producer = list(graph.producer)
        self.reads = [tuple(s for s in op.reads if not resident[s]) for op in graph.ops]
        self.writes = [op.writes for op in graph.ops]
        self.replay_bytes = [sum(self.sizes[s] for s in op.replay) for op in graph.ops]
        self.workspace_bytes = [op.workspace_bytes for op in graph.ops]
        self.times_us = [op.time_us for op in graph.ops]
        self.pinned = [bool(op.pinned) for op in graph.ops]
        self.ordered = [op.ordered for op in graph.ops]
        self.ordered_ops = [index for index, op in enumerate(graph.plain_ops) if op.ordered]
        remakable = [s for s, op in enumerate(self.producer) if op >= 0 and self.sizes[s] and not self.pinned[op]]
        self.remakable = integers(remakable)
        self.least_us = {s: self.times_us[self.producer[s]] for s in remakable}
        self.least_prices = {s: time_us / self.sizes[s] for s, time_us in self.least_us.items()}
        self.tangents = [s for s, info in enumerate(graph.storages) if info.kind == "tangent"]
        self.dependents: list[list[int]] = [[] for _ in graph.ops]
        for index, reads in enumerate(self.reads[: graph.plain_count]):
            for producer in {self.producer[s] for s in reads} - {-1}:
                self.dependents[producer].append(index)
        late = frozenset(s for s in graph.gradients if graph.storages[s].kind == "backward")
        plain = [tuple(s for s in writes if s in late) for writes in self.writes[: graph.plain_count]]
        self.gradients_of = [*plain, *(() for _ in range(graph.alternatives))]
        self.gradient_ops = [op for op, written in enumerate(self.gradients_of) if written]
        self.passed_through = [s for s in graph.gradients if s not in late and not resident[s]]
        self.anchored = bool(set(self.tangents).difference(*self.reads)) or self._delivered_at_once()

    def _delivered_at_once(self) -> bool:
        """Whether gradients that are just passed through are handed over at the first backward step."""
        waiting_bytes = sum(self.sizes[s] for s in self.passed_through)
        return bool(self.passed_through) and waiting_bytes >= self.graph.stage_bytes
