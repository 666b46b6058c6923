"""The fastest schedule of all, for graphs of about a dozen ops: an oracle for tests.

Dijkstra's algorithm over states of execution: what has run, what is live. Every schedule is covered in which forward
runs each forward op once in graph order and backward runs every op at least once; copies may be dropped at any time,
in steps of their own that cost nothing. Bytes are counted as `simulate` counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count

from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.schedule import Schedule
from fxckpt.errors import SolverError

_NO_OP = -1


@dataclass(frozen=True, slots=True)
class _State:
    """Sets as bits of an integer, over ops or over storages.

    `executed`: ops that have run. `live`: storages that can be read, replay state that is kept. `held`: storages whose
    first copy something other than an op keeps alive. `again`: held storages of which a newer copy was written.
    `waiting`: finished gradients that have not been handed over. `started`: whether backward has made a step.
    """

    executed: int = 0
    live: int = 0
    held: int = 0
    again: int = 0
    waiting: int = 0
    started: bool = False


def exhaustive(graph: Graph, budget_bytes: int, *, reorder: bool = True, most_ops: int = 14) -> Schedule:
    """The fastest schedule within the budget; the fastest of those of lowest peak if none is.

    Args:
        graph: the training step.
        budget_bytes: bound on the peak [B].
        reorder: whether first runs of backward ops may change places.
        most_ops: refuse larger graphs; time and memory grow exponentially.

    Raises:
        SolverError: the graph has more than `most_ops` ops.
    """
    if graph.plain_count > most_ops:
        raise SolverError(
            f"the exhaustive solver takes at most {most_ops} ops, this graph has {graph.plain_count}: use dp or milp, "
            "or raise most_ops and have patience"
        )
    machine = _Machine(graph, reorder)
    found = machine.fastest(budget_bytes)
    if found is None:
        found = machine.fastest(machine.lowest_peak())
    assert found is not None
    return Schedule(tuple(found), graph.forward_count)


class _Machine:
    """The states that a graph's execution can be in, and the steps between them."""

    def __init__(self, graph: Graph, reorder: bool) -> None:
        self.graph = graph
        self.reorder = reorder
        resident = {i for i, s in enumerate(graph.storages) if s.kind in RESIDENT}
        self.reads = [_bits(s for s in op.reads if s not in resident) for op in graph.ops]
        self.writes = [_bits(op.writes) for op in graph.ops]
        self.replay = [_bits(op.replay) for op in graph.ops]
        self.tangents = _bits(i for i, s in enumerate(graph.storages) if s.kind == "tangent")
        self.outputs = _bits(s for s in graph.outputs if s not in resident)
        self.updates = _bits(s for s in graph.updates if s not in resident)
        self.gradients = _bits(s for s in graph.gradients if s not in resident)
        self.late = _bits(s for s in graph.gradients if graph.storages[s].kind == "backward")
        self.forward = (1 << graph.forward_count) - 1
        self.all = (1 << graph.plain_count) - 1
        self._sizes: dict[int, int] = {0: 0}

    def size(self, storages: int) -> int:
        """Bytes of a set of storages [B]."""
        if storages not in self._sizes:
            low = storages & -storages
            own = self.graph.storages[low.bit_length() - 1].size_bytes
            self._sizes[storages] = own + self.size(storages ^ low)
        return self._sizes[storages]

    def fastest(self, budget_bytes: int) -> list[int] | None:
        """The ops of the fastest execution within the budget, or None if there is none (Dijkstra 1959)."""
        number = count()
        start = self._start()
        queue: list[tuple[float, int, _State]] = [(0.0, next(number), start)]
        best: dict[_State, float] = {start: 0.0}
        came: dict[_State, tuple[_State, int]] = {}
        while queue:
            time_us, _, state = heappop(queue)
            if time_us > best[state]:
                continue
            if state.executed == self.all:
                return _trace(came, state)
            for op, following, peak_bytes in self._steps(state):
                then_us = time_us + (self.graph.ops[op].time_us if op != _NO_OP else 0.0)
                if peak_bytes <= budget_bytes and then_us < best.get(following, float("inf")):
                    best[following] = then_us
                    came[following] = (state, op)
                    heappush(queue, (then_us, next(number), following))
        return None

    def lowest_peak(self) -> int:
        """The smallest peak of all executions: the same search for the least maximum [B]."""
        number = count()
        start = self._start()
        queue = [(self.graph.static_bytes, next(number), start)]
        best = {start: self.graph.static_bytes}
        while queue:
            most_bytes, _, state = heappop(queue)
            if state.executed == self.all:
                return most_bytes
            for _, following, peak_bytes in self._steps(state):
                then_bytes = max(most_bytes, peak_bytes)
                if then_bytes < best.get(following, then_bytes + 1):
                    best[following] = then_bytes
                    heappush(queue, (then_bytes, next(number), following))
        raise AssertionError("the plain schedule is an execution")

    def _start(self) -> _State:
        return self._begin_backward(_State()) if not self.forward and self.all else _State()

    def _begin_backward(self, state: _State) -> _State:
        held = state.held & ~(self.updates & ~self.outputs)
        passed = self.gradients & ~self.late
        return replace(state, live=state.live | self.tangents, held=held | passed, waiting=passed)

    def _steps(self, state: _State) -> Iterator[tuple[int, _State, int]]:
        """Every op that may run next and every copy that may be dropped: (op, state after it, bytes in use)."""
        for op in self._runnable(state):
            yield from self._run(op, state)
        droppable = state.live & ~(state.held & ~state.again)
        if not state.started:  # tangents are there at least during the first step of backward
            droppable &= ~self.tangents
        while droppable:
            storage = droppable & -droppable
            droppable ^= storage
            yield _NO_OP, replace(state, live=state.live & ~storage), 0

    def _runnable(self, state: _State) -> Iterator[int]:
        executed = state.executed
        if executed & self.forward != self.forward:
            candidates = range(executed.bit_length(), executed.bit_length() + 1)
        else:
            candidates = range(self.graph.plain_count)
        first_left = (~executed & (executed + 1)).bit_length() - 1
        ordered_may_run = True
        for index in candidates:
            op = self.graph.ops[index]
            done = executed >> index & 1
            if done:
                if op.pinned or self.replay[index] & ~state.live:
                    continue
            elif not self.reorder and index != first_left:
                continue
            elif op.ordered:
                if not ordered_may_run:
                    continue
                ordered_may_run = False
            if not self.reads[index] & ~state.live:
                yield index

    def _run(self, op: int, state: _State) -> Iterator[tuple[int, _State, int]]:
        writes, bit = self.writes[op], 1 << op
        done = bool(state.executed & bit)
        live = state.live | writes
        held, again, waiting = state.held, state.again, state.waiting
        if done:
            again |= writes & held
        else:
            held |= writes & (self.outputs | self.updates | self.gradients)
            waiting |= writes & self.late
        in_use = self.size(live & ~held) + self.size(held) + self.size(live & again & held)
        peak_bytes = self.graph.static_bytes + in_use + self.graph.ops[op].workspace_bytes
        executed = state.executed | bit
        in_backward = state.executed & self.forward == self.forward
        if self.graph.gradients_allocated and in_backward and self.size(waiting) >= self.graph.stage_bytes:
            released = waiting & ~self.outputs
            held, again, waiting = held & ~released, again & ~released, 0
        after = _State(executed, live, held, again, waiting, in_backward)
        if executed == self.forward and not in_backward:
            after = self._begin_backward(after)
        yield op, after, peak_bytes
        if not done and self.replay[op]:
            kept = replace(after, live=after.live | self.replay[op])
            yield op, kept, peak_bytes + self.size(self.replay[op])


def _bits(indices: Iterable[int]) -> int:
    result = 0
    for index in indices:
        result |= 1 << index
    return result


def _trace(came: dict[_State, tuple[_State, int]], state: _State) -> list[int]:
    ops = []
    while state in came:
        state, op = came[state]
        if op != _NO_OP:
            ops.append(op)
    return ops[::-1]
