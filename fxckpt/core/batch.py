"""The largest batch that fits a budget when it is planned: plans only, nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from fxckpt.core.graph import Graph
from fxckpt.core.pareto import Pareto
from fxckpt.core.plans import Plan
from fxckpt.core.simulate import Timeline
from fxckpt.core.solvers import Solver, look_up, lowest, solve
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.units import format_bytes

_GROWTH = 16  # a guess is at most so many times the largest batch that is known to fit


@dataclass(frozen=True)
class Try:
    """A batch size that was tried: the lowest peak found for it, at a price that is allowed [B]."""

    batch_size: int
    floor_bytes: int


@dataclass(frozen=True)
class MaxBatch:
    """The largest batch that fits a budget.

    Attributes:
        batch_size: how large it is.
        plan: its plan.
        tries: what was tried on the way, in this order.
    """

    batch_size: int
    plan: Plan
    tries: tuple[Try, ...]

    def __str__(self) -> str:
        plan = self.plan
        return (
            f"a batch of {self.batch_size} fits {format_bytes(plan.budget_bytes)}: its step takes "
            f"{format_bytes(plan.predicted.peak_bytes)} (the plain one {format_bytes(plan.baseline.peak_bytes)}), and "
            f"recomputing adds {plan.predicted.recompute_us / max(plan.baseline.step_us, 1e-12):.1%} to its time"
        )


class _Search:
    """What is known while the bracket closes: `fits` does, `too_large` does not."""

    def __init__(self, budget_bytes: int, least: int, most: int) -> None:
        self.budget_bytes = budget_bytes
        self.fits, self.too_large = least - 1, most + 1
        self.tries: list[Try] = []

    def learn(self, batch_size: int, floor_bytes: int) -> bool:
        self.tries.append(Try(batch_size, floor_bytes))
        fits = floor_bytes <= self.budget_bytes
        if fits:
            self.fits = batch_size
        else:
            self.too_large = batch_size
        return fits

    def guess(self) -> int:
        """The next size to try: where a line through two tries meets the budget.

        Every third time the middle, or the double while nothing was too large, since not every growth is a line. Where
        the line fell short by little, a bit further, to close the bracket from above.
        """
        first, last = self.fits + 1, self.too_large - 1
        if not self.tries:
            return first
        bounded = any(t.floor_bytes > self.budget_bytes for t in self.tries)
        farther = (first + last) // 2 if bounded else 2 * self.fits
        if len(self.tries) % 3:
            size = min(self._line() or farther, _GROWTH * self.fits)
            creeps = [t.batch_size for t in self.tries[-2:]] == [self.fits - 1, self.fits]
            if creeps and size <= first:
                size = first + first // 16
        else:
            size = farther
        return max(first, min(last, size))

    def _line(self) -> int | None:
        """Where a line through the two tries nearest the budget meets it; None if there is none that rises."""
        near = sorted(self.tries, key=lambda t: (abs(t.floor_bytes - self.budget_bytes), t.batch_size))[:2]
        if len(near) < 2:
            return None
        a, b = sorted(near, key=lambda t: t.batch_size)
        slope = (b.floor_bytes - a.floor_bytes) / (b.batch_size - a.batch_size)
        return a.batch_size + int((self.budget_bytes - a.floor_bytes) / slope) if slope > 0 else None


def largest_batch(
    graph_of: Callable[[int], Graph],
    budget_bytes: int,
    solver: str | Solver,
    options: Mapping[str, Any],
    *,
    least: int,
    most: int,
    cost_model: str,
    max_overhead: float | None = None,
    progress: bool,
) -> MaxBatch:
    """The largest batch size from `least` to `most` whose step fits a budget, supposing that a smaller one fits too.

    Args:
        graph_of: the step of a batch size.
        budget_bytes: bound on the peak [B].
        solver, options: as for `fxckpt.core.solvers.solve`.
        least, most: bounds on the size.
        cost_model: name of the cost model behind the times.
        max_overhead: the most time that recomputing may add, as a fraction of the plain step of the same batch; None:
            any.
        progress: whether to show on stderr how far it is.

    Raises:
        InfeasibleBudgetError: not even the least batch fits.
    """
    search = _Search(budget_bytes, least, most)
    best: Timeline | None = None
    with tqdm(desc="largest batch", unit=" sizes", disable=not progress) as bar:
        while search.too_large - search.fits > 1:
            size = search.guess()
            graph = graph_of(size)
            if max_overhead is None:
                found = lowest(graph, solver, **options).timeline
            else:
                found = _lowest_within(graph, budget_bytes, max_overhead, solver, options)
            best = found if search.learn(size, found.peak_bytes) else best
            if best is None:
                raise _too_small(size, found.peak_bytes, budget_bytes, max_overhead)
            bar.set_postfix_str(f"{search.fits} fit")
            bar.update()
    assert best is not None
    solution = solve(best.graph, budget_bytes, solver, **options)
    fastest = min(solution.timeline, best, key=lambda timeline: timeline.step_us)
    plan = Plan.of(fastest, solver=solution.solver, cost_model=cost_model, budget_bytes=budget_bytes)
    return MaxBatch(search.fits, plan, tuple(search.tries))


def _lowest_within(
    graph: Graph, budget_bytes: int, max_overhead: float, solver: str | Solver, options: Mapping[str, Any]
) -> Timeline:
    """Of the schedules that add no more than this to the plain step's time, the one of lowest peak that is found.

    A quick curve tells that, and so what to try next. Where it doesn't fit, the fastest that fits may be fast enough.
    """
    _, method = look_up(solver)
    quick = options if method.frontier is None else {**options, "effort": "fast"}
    curve = Pareto.of(graph, solver, **quick)
    most_us = max_overhead * curve.baseline.step_us
    best = min((t for t in curve.timelines if t.recompute_us <= most_us), key=lambda t: t.peak_bytes)
    if best.peak_bytes <= budget_bytes:
        return best
    try:
        fastest = solve(graph, budget_bytes, solver, **options).timeline
    except InfeasibleBudgetError:
        return best
    return fastest if fastest.recompute_us <= most_us else best


def _too_small(size: int, floor_bytes: int, budget_bytes: int, max_overhead: float | None) -> InfeasibleBudgetError:
    condition, remedy = "", ""
    if max_overhead is not None:
        condition = f" if recomputing may add {max_overhead:.1%} to its time"
        remedy = ", allow a larger max_overhead"
    return InfeasibleBudgetError(
        f"a batch of {size} takes {format_bytes(floor_bytes)} ({floor_bytes} bytes) at the least{condition}, over the "
        f"budget of {format_bytes(budget_bytes)}. Raise the budget to {floor_bytes} bytes{remedy}, or use a smaller "
        "model.",
        budget_bytes=budget_bytes,
        floor_bytes=floor_bytes,
    )
