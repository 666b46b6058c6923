"""Does fxckpt repeat fewer FLOPs than what torch offers, at the same peak? All priced by one simulator; nothing is run.

    python -m benchmarks.torch_planner [--quick] [--budgets 24] [--output benchmarks/results] [model …]

For each model, torch's own planner (`activation_memory_budget`, swept from 0 to 1), `checkpoint` around every k blocks,
`checkpoint_sequential` and selective checkpointing are written as schedules of the captured step
(`benchmarks/peer_schedules.py`) and simulated. fxckpt then plans for each of their peaks. The FLOPs are those of matrix
products, convolutions and attention; a schedule's figure is what it repeats, over those of the plain step.

Both sides minimize the same: time is FLOPs here (torch's planner knows nothing else), with a millionth of each op's
estimated time to settle ties. Exits with 1 if fxckpt repeats more FLOPs anywhere, or can't go below all peaks.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.peer_schedules import by_hand, torch_planner
from benchmarks.subjects import Subject, subjects
from fxckpt.capture.joint import capture
from fxckpt.compile import estimated
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.graph import Graph
from fxckpt.profile.build import Profile, build
from fxckpt.profile.estimate import DEVICES
from fxckpt.schedule import Schedule, plain
from fxckpt.simulate import simulate
from fxckpt.solvers import solve

MODELS = ("gpt12", "bert6", "resnet50", "unet4", "mlp32", "llama12")
NEAR_ZERO = (0.01, 0.02, 0.03, 0.05)
"""Budgets where torch's planner is known to turn: less memory asked for, more memory used."""


@dataclass(frozen=True)
class Point:
    """What a peer does, and fxckpt at the peer's peak.

    Attributes:
        peer: what it is.
        peak_bytes: its simulated peak, parameters and all [B].
        repeated_flops_ratio: FLOPs that it repeats over those of the plain step.
        repeated_time_ratio: estimated time that it repeats over that of the plain step.
        fxckpt_peak_bytes, fxckpt_repeated_flops_ratio, fxckpt_repeated_time_ratio: the same for fxckpt, given
            `peak_bytes` as its budget; None where it finds no schedule.
    """

    peer: str
    peak_bytes: int
    repeated_flops_ratio: float
    repeated_time_ratio: float
    fxckpt_peak_bytes: int | None
    fxckpt_repeated_flops_ratio: float | None
    fxckpt_repeated_time_ratio: float | None

    @property
    def is_met(self) -> bool:
        """Whether fxckpt repeats no more FLOPs."""
        ours = self.fxckpt_repeated_flops_ratio
        return ours is not None and ours <= self.repeated_flops_ratio


@dataclass(frozen=True)
class Comparison:
    """All points of a model; `floor_bytes` is the lowest peak that fxckpt reaches [B]."""

    model: str
    plain_peak_bytes: int
    static_bytes: int
    floor_bytes: int
    points: tuple[Point, ...]

    @property
    def is_met(self) -> bool:
        """Whether fxckpt repeats no more FLOPs at any point, and its floor is below all of them."""
        return all(p.is_met for p in self.points) and self.floor_bytes < min(p.peak_bytes for p in self.points)


def in_flops(graph: Graph) -> Graph:
    """The graph with FLOPs for times, and a millionth of the time to settle ties."""
    return replace(graph, ops=tuple(replace(op, time_us=op.flops + op.time_us * 1e-6) for op in graph.ops))


def peers(profile: Profile, blocks: list[str], budgets: list[float]) -> Iterator[tuple[str, Schedule]]:
    """Names and schedules of what torch offers."""
    yield from by_hand(profile.graph, blocks)
    for budget in budgets:
        yield f"activation_memory_budget {budget:g}", torch_planner(profile, budget)


def repeated_flops_ratio(graph: Graph, schedule: Schedule) -> float:
    """FLOPs repeated over the FLOPs of the plain step."""
    repeated = sum(graph.ops[i].flops * count for i, count in schedule.repeats().items())
    return repeated / sum(op.flops for op in graph.ops)


def repeated_time_ratio(graph: Graph, schedule: Schedule) -> float:
    """Estimated time repeated over that of the plain step."""
    return simulate(graph, schedule).recompute_us / graph.step_us


class Ours:
    """fxckpt's schedules of a graph, each budget planned once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = in_flops(graph)
        self._planned: dict[int, Schedule | None] = {}

    def at(self, budget_bytes: int) -> Schedule | None:
        """The schedule for a budget, or None if it finds none."""
        if budget_bytes not in self._planned:
            try:
                self._planned[budget_bytes] = solve(self._graph, budget_bytes).schedule
            except InfeasibleBudgetError:
                self._planned[budget_bytes] = None
        return self._planned[budget_bytes]

    def floor_bytes(self) -> int:
        """The lowest peak [B]."""
        try:
            return solve(self._graph, 0).timeline.peak_bytes
        except InfeasibleBudgetError as error:
            return error.floor_bytes


def compare(subject: Subject, budgets: list[float], quick: bool) -> Comparison:
    """Profile a subject, put the peers on its graph, and plan at each peer's peak."""
    model, args, kwargs = (subject.quick if quick else subject.full).build()
    profile = build(capture(model, args, kwargs), estimated(DEVICES["cpu"]))
    graph, ours = profile.graph, Ours(profile.graph)
    points = []
    for name, schedule in tqdm(list(peers(profile, list(subject.paths(model)), budgets)), subject.name, leave=False):
        peak_bytes = simulate(graph, schedule).peak_bytes
        found = ours.at(peak_bytes)
        figures: tuple[Any, ...] = (None, None, None)
        if found is not None:
            flops, time = repeated_flops_ratio(graph, found), repeated_time_ratio(graph, found)
            figures = simulate(graph, found).peak_bytes, flops, time
        theirs = repeated_flops_ratio(graph, schedule), repeated_time_ratio(graph, schedule)
        points.append(Point(name, peak_bytes, *theirs, *figures))
    peak_bytes = simulate(graph, plain(graph)).peak_bytes
    return Comparison(subject.name, peak_bytes, graph.static_bytes, ours.floor_bytes(), tuple(points))


def markdown(comparisons: list[Comparison]) -> str:
    parts = [_section(comparison) for comparison in comparisons]
    return "\n".join(parts)


def _section(comparison: Comparison) -> str:
    rows = [
        (
            p.peer,
            _mib(p.peak_bytes),
            _percent(p.repeated_flops_ratio),
            _percent(p.fxckpt_repeated_flops_ratio),
            _mib(p.fxckpt_peak_bytes),
            "yes" if p.is_met else "**no**",
        )
        for p in comparison.points
    ]
    headers = ("peer", "peak MiB", "repeats FLOPs %", "fxckpt at that peak %", "its peak MiB", "no more")
    lowest = min(p.peak_bytes for p in comparison.points)
    return (
        f"## {comparison.model}\n\nPlain peak {_mib(comparison.plain_peak_bytes)} MiB, of which "
        f"{_mib(comparison.static_bytes)} are there before the step. Lowest peak: fxckpt "
        f"{_mib(comparison.floor_bytes)}, the others {_mib(lowest)} MiB.\n\n"
        + tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        + "\n"
    )


def _mib(size_bytes: int | None) -> str:
    return "–" if size_bytes is None else f"{size_bytes / 2**20:.2f}"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{100 * ratio:.2f}"


def write(folder: Path, comparisons: list[Comparison]) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    data = {"versions": versions, "models": [asdict(c) for c in comparisons]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "torch_planner.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "torch_planner.md").write_text(f"{__doc__.splitlines()[0]}\n\n{markdown(comparisons)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of all subjects; by default {', '.join(MODELS)}")
    parser.add_argument("--quick", action="store_true", help="small models, fewer budgets")
    parser.add_argument("--budgets", type=int, default=20, help="how many values of torch's budget, evenly, and 0")
    parser.add_argument("--output", type=Path, help="folder for the tables")
    options = parser.parse_args()
    count = 4 if options.quick else options.budgets
    budgets = sorted({*(round(i / count, 4) for i in range(count + 1)), *NEAR_ZERO})
    comparisons = []
    for subject in subjects(options.models or list(MODELS)):
        comparisons.append(compare(subject, budgets, options.quick))
        print(_section(comparisons[-1]), flush=True)
        if options.output is not None:
            write(options.output, comparisons)
    sys.exit(not all(c.is_met for c in comparisons))


if __name__ == "__main__":
    main()
