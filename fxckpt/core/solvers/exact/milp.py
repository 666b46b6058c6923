"""A mixed-integer program for schedules that keep backward's order: an oracle for graphs of some fifty ops.

The stages are those of Jain et al., "Checkmate" (2020), arXiv:1910.02653, one for each backward op: stage t may repeat
any op that comes before its own in graph order, each once and in that order, and then runs its own. Memory is modelled
by retention instead of their products: N[t,s,k] says that storage s is alive in stage t until its k-th reader there.
With R[t,o] (op o runs in stage t) and S[t,s] (s is alive when stage t begins):

    N[t,s,k] >= R[t,k-th reader of s]     N[t,s,k] >= N[t,s,k+1]     N[t,s,last+1] = S[t+1,s]
    N[t,s,1] <= S[t,s] + R[t,producer of s]

and what is alive at each op of each stage, added up, is within the budget. Forward runs as it stands. Outputs and
gradients are counted for as long as something other than an op holds them; ops that write them are not repeated.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.schedule import Schedule, deliveries, plain
from fxckpt.core.simulate import simulate
from fxckpt.errors import MissingExtraError, SolverError

_CORRECTIONS = 4
Row = dict[int, float]
"""Coefficients of variables; the key _ONE stands for a constant."""
_ONE = -1


def milp(graph: Graph, budget_bytes: int, *, most_nodes: int = 1_000_000, gap_ratio: float = 0.0) -> Schedule:
    """The fastest schedule that keeps backward's order and fits the budget; one of lowest peak if none fits.

    Args:
        graph: the training step.
        budget_bytes: bound on the peak [B].
        most_nodes: give up after so many nodes of the branch-and-bound tree.
        gap_ratio: how far from the optimum the result may be.

    Raises:
        MissingExtraError: scipy is not installed.
        SolverError: the optimum was not found within `most_nodes`.
    """
    program, bound_bytes = _Program(graph), budget_bytes
    for _ in range(_CORRECTIONS):
        found = program.solve(bound_bytes, most_nodes, gap_ratio)
        if found is None:
            break
        over_bytes = simulate(graph, found).peak_bytes - budget_bytes
        if over_bytes <= 0:
            return found
        bound_bytes -= over_bytes  # the floating-point solver rounded
    lowest = program.solve(None, most_nodes, gap_ratio) or plain(graph)
    lowest_bytes = simulate(graph, lowest).peak_bytes
    fastest = program.solve(lowest_bytes, most_nodes, gap_ratio)
    return fastest if fastest and simulate(graph, fastest).peak_bytes <= lowest_bytes else lowest


class _Program:
    """Variables, rows and objective of the program of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.stages = graph.plain_count - graph.forward_count
        self.costs: list[float] = []
        self.integral: list[bool] = []
        self.rows: list[tuple[Row, float]] = []  # sum of coefficient times variable is at most the number
        self.memory: list[Row] = []
        self.resident = [s.kind in RESIDENT for s in graph.storages]
        self.held = self._held_stages()
        self.readers: dict[int, list[int]] = defaultdict(list)
        for index, op in enumerate(graph.plain_ops):
            for storage in op.reads:
                self.readers[storage].append(index)
        self.R = [self._repeats(stage) for stage in range(self.stages)]
        self.S = [self._alive(stage) for stage in range(self.stages)]
        self.S.append({})
        self.Q = self._replayed()
        self._forward_memory()
        for stage in range(self.stages):
            self._stage(stage)

    def variable(self, cost: float = 0.0, *, integral: bool = False) -> int:
        """A new variable between 0 and 1."""
        self.costs.append(cost)
        self.integral.append(integral)
        return len(self.costs) - 1

    def at_least(self, larger: Row, smaller: Row) -> None:
        """Demand that one sum is at least another."""
        row, constant = dict[int, float](), 0.0
        for sign, terms in ((1.0, smaller), (-1.0, larger)):
            for key, value in terms.items():
                if key == _ONE:
                    constant += sign * value
                else:
                    row[key] = row.get(key, 0.0) + sign * value
        if row:
            self.rows.append((row, -constant))
        elif constant > 0:
            raise SolverError("the plain schedule does not satisfy the program")

    def _held_stages(self) -> dict[int, tuple[int, int]]:
        """Stages during which something other than an op keeps the first copy of a storage: (first, last)."""
        graph, count = self.graph, self.graph.forward_count
        held = {s: (-1, self.stages) for s in graph.outputs if not self.resident[s]}
        leaves: dict[int, int] = dict.fromkeys(graph.gradients, self.stages)
        if graph.gradients_allocated:
            for delivery in deliveries(graph, plain(graph)):
                leaves.update(dict.fromkeys(delivery.gradients, delivery.step - count))
        for storage in graph.gradients:
            if not self.resident[storage] and storage not in held:
                producer = graph.producer[storage]
                held[storage] = (producer - count if producer >= 0 else -1, leaves[storage])
        return held

    def _is_held(self, stage: int, storage: int) -> bool:
        first, last = self.held.get(storage, (0, -1))
        return first < stage <= last

    def _repeats(self, stage: int) -> dict[int, Row]:
        """R: for each op that can run in a stage the variable; the stage's own op does run."""
        graph, own = self.graph, self.graph.forward_count + stage
        always = {s for s in self.held if self.held[s][1] >= stage}
        result: dict[int, Row] = {own: {_ONE: 1.0}}
        for index in range(own):
            op = graph.ops[index]
            if op.writes and not op.pinned and not always.intersection(op.writes):
                result[index] = {self.variable(op.time_us, integral=True): 1.0}
        return result

    def _alive(self, stage: int) -> dict[int, Row]:
        """S: for each storage written before a stage whether it is alive when the stage begins."""
        result: dict[int, Row] = {}
        own = self.graph.forward_count + stage
        for storage, info in enumerate(self.graph.storages):
            written = self.graph.producer[storage]
            if self._is_held(stage, storage):
                result[storage] = {_ONE: 1.0}
            elif info.kind == "tangent" or 0 <= written < own:
                result[storage] = {_ONE: 1.0} if stage == 0 and written < 0 else {self.variable(integral=True): 1.0}
        return result

    def _replayed(self) -> list[dict[int, Row]]:
        """Q: whether an op that needs its old state is repeated in a stage or later; one more at the end."""
        after: list[dict[int, Row]] = [{}]
        for stage in reversed(range(self.stages)):
            now: dict[int, Row] = {}
            for index, repeat in self.R[stage].items():
                if self.graph.ops[index].replay and index != self.graph.forward_count + stage:
                    now[index] = {self.variable(): 1.0}
                    self.at_least(now[index], repeat)
                    self.at_least(now[index], after[-1].get(index, {}))
            after.append(now)
        return after[::-1]

    def _add(self, total: Row, terms: Row, size_bytes: int) -> None:
        for key, value in terms.items():
            total[key] = total.get(key, 0.0) + size_bytes * value

    def _forward_memory(self) -> None:
        graph, count = self.graph, self.graph.forward_count
        last = {s: max((r for r in readers if r < count), default=-1) for s, readers in self.readers.items()}
        updates = frozenset(graph.updates)
        for position in range(count):
            total: Row = {_ONE: graph.static_bytes + graph.ops[position].workspace_bytes}
            for storage, info in enumerate(graph.storages):
                written = graph.producer[storage]
                if not 0 <= written <= position:
                    continue
                used = position <= max(written, last.get(storage, -1)) or storage in updates
                alive = {_ONE: 1.0} if used or self._is_held(0, storage) else self.S[0].get(storage, {})
                self._add(total, alive, info.size_bytes)
            for index, later in self.Q[0].items():
                if index <= position:
                    self._add(total, later, graph.bytes_of(graph.ops[index].replay))
            self.memory.append(total)

    def _stage(self, stage: int) -> None:
        """Liveness in a stage, and what is in use at each of its ops."""
        graph, own = self.graph, self.graph.forward_count + stage
        totals: dict[int, Row] = {}
        for position, runs in self.R[stage].items():
            totals[position] = {_ONE: float(graph.static_bytes)}
            self._add(totals[position], runs, graph.ops[position].workspace_bytes)
        for storage, info in enumerate(graph.storages):
            written = graph.producer[storage]
            if self.resident[storage] or written > own or (written < 0 and info.kind != "tangent"):
                continue
            for position, alive in self._life(stage, storage, sorted(totals)).items():
                self._add(totals[position], alive, info.size_bytes)
        for index in {*self.Q[stage], *self.Q[stage + 1]}:
            for position, total in totals.items():
                later = self.Q[stage] if position <= index != own else self.Q[stage + 1]
                self._add(total, later.get(index, {}), graph.bytes_of(graph.ops[index].replay))
        self.memory += totals.values()

    def _life(self, stage: int, storage: int, positions: list[int]) -> dict[int, Row]:
        """Whether a storage is alive at each op of a stage."""
        own, written = self.graph.forward_count + stage, self.graph.producer[storage]
        if self._is_held(stage, storage):
            return {position: {_ONE: 1.0} for position in positions}
        before: Row = self.S[stage].get(storage, {})
        runs: Row = self.R[stage].get(written, {})
        after: Row = self.S[stage + 1].get(storage, {})
        if written == own and self.held.get(storage, (0, -1))[1] > stage:
            after = {_ONE: 1.0}
        if stage == 0 and written < 0 and not self.readers[storage]:
            after = {_ONE: 1.0}  # it is there at the first step, whatever that is
        kept = {own + 1: after}
        until = after
        for reader in reversed([r for r in self.readers[storage] if r <= own and r in self.R[stage]]):
            needed: Row = {self.variable(): 1.0}
            self.at_least(needed, self.R[stage][reader])
            self.at_least(needed, until)
            kept[reader] = until = needed
        self.at_least({**before, **runs} if not before.keys() & runs.keys() else {_ONE: 2.0}, until)
        alive: dict[int, Row] = {}
        for position in positions:
            if position < written:
                alive[position] = before
            elif position == written:
                alive[position] = {self.variable(): 1.0}
                self.at_least(alive[position], runs)
                self.at_least(alive[position], until)
            else:
                alive[position] = kept[min(reader for reader in kept if reader >= position)]
        return alive

    def solve(self, budget_bytes: int | None, most_nodes: int, gap_ratio: float) -> Schedule | None:
        """The optimum within a budget, or, without one, a schedule of lowest peak; None if there is none.

        Bytes are given to the solver in units of the largest step's, since it works to absolute tolerances.
        """
        unit_bytes = max((sum(row.values()) for row in self.memory), default=0) or 1
        rows = list(self.rows)
        costs = self.costs
        peak = [len(self.costs)] if budget_bytes is None else []
        if peak:
            costs = [0.0] * len(self.costs) + [1.0]
        for total in self.memory:
            row = {key: value / unit_bytes for key, value in total.items() if key != _ONE and value}
            row |= dict.fromkeys(peak, -1.0)
            rows.append((row, ((budget_bytes or 0) - total[_ONE]) / unit_bytes))
        chosen = _optimize(costs, [*self.integral, *(False for _ in peak)], rows, most_nodes, gap_ratio)
        return None if chosen is None else self._schedule(chosen)

    def _schedule(self, chosen: Any) -> Schedule:
        order = list(range(self.graph.forward_count))
        for repeats in self.R:
            own = max(repeats)
            order += [i for i in sorted(repeats) if i != own and chosen[next(iter(repeats[i]))] > 0.5]
            order.append(own)
        return Schedule(tuple(order), self.graph.forward_count)


def _optimize(
    costs: list[float], integral: list[bool], rows: list[tuple[Row, float]], most_nodes: int, gap_ratio: float
) -> Any:
    """The cheapest assignment that satisfies all rows, found by HiGHS; None if there is none."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint
        from scipy.optimize import milp as highs
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MissingExtraError("solver milp needs scipy: pip install 'fxckpt[milp]'") from error
    if not costs:
        return [] if all(bound >= 0 for _, bound in rows) else None
    values = [value for row, _ in rows for value in row.values()]
    columns = [key for row, _ in rows for key in row]
    lines = [i for i, (row, _) in enumerate(rows) for _ in row]
    matrix = csr_array((values, (lines, columns)), shape=(len(rows), len(costs)))
    upper = [bound + 1e-9 for _, bound in rows]
    result = highs(
        c=np.array(costs) / max(max(costs), 1e-12),
        integrality=np.array(integral, dtype=int),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, -np.inf, upper),
        options={"node_limit": most_nodes, "mip_rel_gap": gap_ratio},
    )
    if result.status == 2:
        return None
    if result.x is None or result.status not in (0, 1):
        raise SolverError(f"HiGHS found no schedule: {result.message}; allow more nodes, or use solver dp")
    if result.status == 1:
        raise SolverError(f"HiGHS did not prove the optimum within {most_nodes} nodes: allow more, or a gap_ratio")
    return result.x
