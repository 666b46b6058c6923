"""Dynamic programming over segments, with choices a segment and recomputation within recomputation.

The step is cut into segments (`solvers.segments`); for each block of neighbouring ones a minimum cut says what is worth
keeping at which price (`chain.blocks`); the chain's tables say how to combine them in every budget (`chain.chain`).
Figures in the tables guide the search only: schedules are simulated, and the fastest whose simulated peak fits is taken
(`chain.offers`). A local search then removes what thinking in segments leaves (`search.polish`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.core.solvers.chain.backward_order import Reordered, delayed, reordered, unchanged
from fxckpt.core.solvers.chain.ease import eased
from fxckpt.core.solvers.chain.offers import Fineness, Offers, Prices
from fxckpt.core.solvers.keep import closure, fastest_fitting, pinned_storages
from fxckpt.core.solvers.search.polish import SHORT, Search, polish
from fxckpt.core.solvers.segments import Segments, Where, cut

Effort = Literal["fast", "default", "max"]
_Tables = Sequence[tuple[Offers, Reordered]]


@dataclass(frozen=True)
class Level:
    """How much work to do.

    Attributes:
        longest_ops: segments longer than this have their long-lived storages pinned; for each entry the step is cut
            anew.
        saved: for which ways to count activations backward is eased.
        most_segments: neighbours are merged until there are no more.
        fineness: how finely each cutting is looked at.
        search: how long the local search takes: with "default" a second or two for some hundred ops, with "max" up to a
            minute.
        over_ratios: by how much schedules may be over the budget that are tried as starts too.
        finer: where else to cut if that makes more segments. Where backward reads none of what crosses, a segment's
            backward needs no more than the segment's input.
    """

    longest_ops: tuple[int, ...]
    saved: tuple[bool, ...]
    most_segments: int
    fineness: Fineness
    search: Search = SHORT
    over_ratios: tuple[float, ...] = ()
    finer: tuple[Where, ...] = ("any", "unread")


_OVER_RATIOS = (0.01, 0.03, 0.06, 0.1, 0.2)

LEVELS: dict[Effort, Level] = {
    "fast": Level((32,), (False,), 48, Fineness(merged=3, choices=8, slots=1500), finer=("any",)),
    "default": Level(
        (32,),
        (False, True),
        80,
        Fineness(merged=5, choices=16, slots=3000),
        Search(choices=8, exchanged=2, annealed=1, restarts=2, moves=400),
        _OVER_RATIOS,
    ),
    "max": Level(
        (48, 32, 16),
        (False, True),
        128,
        Fineness(merged=5, choices=32, slots=8000),
        Search(choices=40, exchanged=10, annealed=3, restarts=6, moves=1500),
        _OVER_RATIOS,
    ),
}
_FLOOR_STARTS = 5
_MOST_STEPS = 20_000
_LARGE_OPS = 3000
_WORTH_WHILE = 1.2  # a finer cutting is tried if it has so many times the segments


def dp(graph: Graph, budget_bytes: int, *, effort: Effort = "default") -> Schedule:
    """The fastest schedule found that fits, or the one of lowest peak if none does.

    Args:
        graph: the training step.
        budget_bytes: bound on the peak [B].
        effort: "fast", "default" or "max": how many ways to cut the step, how fine the tables, how long the local
            search.
    """
    nothing = simulate(graph, plain(graph))
    if nothing.peak_bytes <= budget_bytes:
        return nothing.schedule
    level = LEVELS[effort]
    tables = list(_tables(graph, level))
    fitting = _fitting(graph, tables, budget_bytes)
    if not fitting:
        floor = _floor(graph, [nothing, *_lowest(graph, tables)], level)
        if floor.peak_bytes > budget_bytes:
            return floor.schedule
        fitting = [floor]
    best = fastest_fitting(fitting, budget_bytes)
    near = _near(graph, tables, budget_bytes, level)
    return polish(graph, best.schedule, budget_bytes, search=level.search, others=near)


def _fitting(graph: Graph, tables: _Tables, budget_bytes: int) -> list[Timeline]:
    """The fastest schedule that fits of each table that has one."""
    return [simulate(graph, schedule) for schedule in _fastest(tables, budget_bytes)]


def _fastest(tables: _Tables, budget_bytes: int) -> list[Schedule]:
    return [order.restored(t.schedule) for offers, order in tables if (t := offers.fastest(budget_bytes))]


def _lowest(graph: Graph, tables: _Tables) -> list[Timeline]:
    """The schedule of lowest peak of each table."""
    return [simulate(graph, order.restored(t.schedule)) for offers, order in tables if (t := offers.lowest())]


def _near(graph: Graph, tables: _Tables, budget_bytes: int, level: Level) -> list[Schedule]:
    """Faster schedules that are somewhat over the budget: the local search may bring them under it."""
    room_bytes = budget_bytes - graph.static_bytes
    over = (_fastest(tables, budget_bytes + int(ratio * room_bytes)) for ratio in level.over_ratios)
    return list(dict.fromkeys(schedule for schedules in over for schedule in schedules))


def _floor(graph: Graph, lowest: list[Timeline], level: Level) -> Timeline:
    """The lowest peak that the local search reaches from the best of the lowest; the same whatever the budget."""
    starts = [*lowest, *(simulate(graph, schedule) for schedule in _keeping_nothing(graph))]
    starts.sort(key=lambda timeline: (timeline.peak_bytes, timeline.step_us))
    found = [simulate(graph, polish(graph, timeline.schedule, 0)) for timeline in starts[:_FLOOR_STARTS]]
    best = fastest_fitting([*starts, *found], 0)
    if level.search != SHORT:
        best = simulate(graph, polish(graph, best.schedule, 0, search=level.search))
    faster = polish(graph, best.schedule, best.peak_bytes)
    return fastest_fitting([best, simulate(graph, faster)], best.peak_bytes)


def _keeping_nothing(graph: Graph) -> Iterator[Schedule]:
    """Everything made anew for each backward op, in several orders of backward; nothing if that is too long."""
    backward = range(graph.forward_count, graph.plain_count)
    kept = {*graph.outputs, *pinned_storages(graph)}
    for order in dict.fromkeys((unchanged(graph), reordered(graph), delayed(graph))):
        steps = list(range(graph.forward_count))
        for index in backward:
            steps += (*closure(order.graph, order.graph.ops[index].reads, kept), index)
            if len(steps) > _MOST_STEPS:
                return
        yield order.restored(Schedule(tuple(steps), graph.forward_count))


def usual_effort(graph: Graph) -> Effort:
    """What to spend where nothing is said: "default", or "fast" on graphs of thousands of ops."""
    return "fast" if graph.plain_count > _LARGE_OPS else "default"


def frontier(graph: Graph, *, effort: Effort | None = None, points: int = 32) -> list[Timeline]:
    """The whole curve from one set of tables: steps from the floor to the plain one, each faster than the last.

    The floor is that of `dp`. For each of some budgets evenly between its peak and the plain step's, the fastest that
    fits of the tables and of the point before is polished a little, so the curve is close to what `dp` finds for each.

    Args:
        graph: the training step.
        effort: as for `dp`: how many tables, and how fine; None for `usual_effort`.
        points: how many budgets; the result has at most two schedules more, and fewer where several give the same.
    """
    nothing = simulate(graph, plain(graph))
    level = LEVELS[effort or usual_effort(graph)]
    tables = list(_tables(graph, level))
    found = [_floor(graph, [nothing, *_lowest(graph, tables)], level)]
    low_bytes, high_bytes = found[0].peak_bytes, nothing.peak_bytes
    budgets = {low_bytes + (high_bytes - low_bytes) * number // (points + 1) for number in range(1, points + 1)}
    for budget_bytes in sorted(budgets):
        best = fastest_fitting([found[-1], *_fitting(graph, tables, budget_bytes)], budget_bytes)
        polished = simulate(graph, polish(graph, best.schedule, budget_bytes))
        if polished.step_us < found[-1].step_us:
            found.append(polished)
    if found[-1].recompute_us > 0:
        found.append(nothing)
    return found


def _tables(graph: Graph, level: Level) -> Iterator[tuple[Offers, Reordered]]:
    """What each order of backward and each cutting of the step offers, and that order."""
    prices: Prices = {}
    most_bytes = simulate(graph, plain(graph)).peak_bytes
    for order in _orders(graph, level):
        for segments in _cuttings(order, level):
            yield Offers(order.graph, segments, most_bytes, fineness=level.fineness, prices=prices), order


def _orders(graph: Graph, level: Level) -> Iterable[Reordered]:
    """Backward as it stands, and with weights' gradients in better places and eased within each segment."""
    better = reordered(graph)
    segments = cut(better.graph, longest_ops=level.longest_ops[0], pinned=better.held)
    eased_orders = (better.then(eased(better.graph, segments, saved=saved)) for saved in level.saved)
    return dict.fromkeys((unchanged(graph), *eased_orders))


def _cuttings(order: Reordered, level: Level) -> Iterator[Segments]:
    seen: set[Segments] = set()
    for longest in level.longest_ops:
        for pinned in (order.held, frozenset[int]()):
            cuts = (
                cut(order.graph, where=where, longest_ops=longest, pinned=pinned) for where in ("read", *level.finer)
            )
            coarse, fine = next(cuts), next(cuts)
            enough = len(fine) < _WORTH_WHILE * len(coarse)
            for segments in (coarse,) if enough else (coarse, fine, *cuts):
                if segments not in seen:
                    seen.add(segments)
                    yield segments.merged(level.most_segments)
