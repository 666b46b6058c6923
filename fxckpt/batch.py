"""The largest batch that fits a budget when it is planned: plans only, nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from fxckpt.errors import InfeasibleBudgetError
from fxckpt.graph import Graph
from fxckpt.plans import Plan
from fxckpt.solvers import Solver, lowest, solve
from fxckpt.units import format_bytes

_GROWTH = 16  # a guess is at most so many times the largest batch that is known to fit


@dataclass(frozen=True)
class Try:
    """A batch size that was tried: the lowest peak found for it [B]."""

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

        Every third time the middle, or the double while nothing was too large, since not every growth is a line.
        """
        first, last = self.fits + 1, self.too_large - 1
        if not self.tries:
            return first
        bounded = any(t.floor_bytes > self.budget_bytes for t in self.tries)
        if len(self.tries) % 3:
            size = min(self._line(), _GROWTH * self.fits)
        else:
            size = (first + last) // 2 if bounded else 2 * self.fits
        return max(first, min(last, size))

    def _line(self) -> int:
        """Peaks grow about in proportion to the batch: the size at which the two tries nearest the budget say so."""
        near = sorted(self.tries, key=lambda t: (abs(t.floor_bytes - self.budget_bytes), t.batch_size))[:2]
        if len(near) < 2:
            return 2 * near[0].batch_size
        a, b = sorted(near, key=lambda t: t.batch_size)
        slope = (b.floor_bytes - a.floor_bytes) / (b.batch_size - a.batch_size)
        return a.batch_size + int((self.budget_bytes - a.floor_bytes) / slope) if slope > 0 else 2 * b.batch_size


def largest_batch(
    graph_of: Callable[[int], Graph],
    budget_bytes: int,
    solver: str | Solver,
    options: Mapping[str, Any],
    *,
    least: int,
    most: int,
    cost_model: str,
    progress: bool,
) -> MaxBatch:
    """The largest batch size from `least` to `most` whose step fits a budget, supposing that a smaller one fits too.

    Args:
        graph_of: the step of a batch size.
        budget_bytes: bound on the peak [B].
        solver, options: as for `fxckpt.solvers.solve`.
        least, most: bounds on the size.
        cost_model: name of the cost model behind the times.
        progress: whether to show on stderr how far it is.

    Raises:
        InfeasibleBudgetError: not even the least batch fits.
    """
    search = _Search(budget_bytes, least, most)
    best: Graph | None = None
    with tqdm(desc="largest batch", unit=" sizes", disable=not progress) as bar:
        while search.too_large - search.fits > 1:
            size = search.guess()
            graph = graph_of(size)
            floor_bytes = lowest(graph, solver, **options).timeline.peak_bytes
            best = graph if search.learn(size, floor_bytes) else best
            if best is None:
                raise _too_small(size, floor_bytes, budget_bytes)
            bar.set_postfix_str(f"{search.fits} fit")
            bar.update()
    assert best is not None
    found = solve(best, budget_bytes, solver, **options)
    plan = Plan(best, found.schedule, found.solver, cost_model, budget_bytes)
    return MaxBatch(search.fits, plan, tuple(search.tries))


def _too_small(size: int, floor_bytes: int, budget_bytes: int) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(
        f"a batch of {size} takes {format_bytes(floor_bytes)} ({floor_bytes} bytes) at the least, over the budget of "
        f"{format_bytes(budget_bytes)}. Raise the budget to {floor_bytes} bytes, or use a smaller model.",
        budget_bytes=budget_bytes,
        floor_bytes=floor_bytes,
    )
