"""Does fxckpt repeat fewer FLOPs than what torch offers, at the same peak? All priced by one simulator; nothing is run.

    python -m benchmarks.torch_planner [--quick] [--budgets 10] [--output benchmarks/results] [model …]

For each model, torch's own planner (`activation_memory_budget`, swept from 0 to 1), `checkpoint` around every k blocks,
`checkpoint_sequential` and selective checkpointing are written as schedules of the captured step
(`benchmarks/peers/schedules.py`) and simulated. fxckpt plans for the peak of each peer that no other peer beats in both
peak and FLOPs; at the other peaks the best of these plans that fits counts. FLOPs are those of matrix products,
convolutions and attention; a figure is what a schedule repeats, over those of the plain step.

All minimize the same: time is FLOPs here (torch's planner knows nothing else), with a millionth of each op's estimated
time to settle ties. Gradients are fresh. The exit status is 1 if fxckpt repeats more FLOPs anywhere, or its floor is
not below all peers' peaks.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.peers.schedules import by_hand, torch_planner
from benchmarks.peers.subjects import Subject, subjects
from fxckpt.capture.joint import capture
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import solve
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.profile.build import Profile, build
from fxckpt.profile.costs import estimated
from fxckpt.profile.devices import DEVICES

MODELS = ("gpt12", "bert6", "resnet50", "unet4", "mlp32", "llama12")
NEAR_ZERO = (0.01, 0.02, 0.03, 0.05)
"""Budgets where torch's planner is known to turn: less memory asked for, more memory used."""


@dataclass(frozen=True)
class Cost:
    """What a schedule takes: its peak, all counted [B], and FLOPs that it repeats over those of the plain step."""

    peak_bytes: int
    repeated_flops_ratio: float

    @classmethod
    def of(cls, graph: Graph, schedule: Schedule) -> Cost:
        """The cost by simulation."""
        repeated = sum(graph.ops[i].flops * count for i, count in schedule.repeats().items())
        return cls(simulate(graph, schedule).peak_bytes, repeated / sum(op.flops for op in graph.ops))

    def beats(self, other: Cost) -> bool:
        """Whether it is no worse in both, and is another point."""
        no_worse = self.peak_bytes <= other.peak_bytes and self.repeated_flops_ratio <= other.repeated_flops_ratio
        return no_worse and self != other


@dataclass(frozen=True)
class Rival:
    """A peer's schedule, and fxckpt's within the same peak, None if it finds none."""

    name: str
    peer: Cost
    fxckpt: Cost | None

    @property
    def is_met(self) -> bool:
        """Whether fxckpt repeats no more FLOPs."""
        return self.fxckpt is not None and self.fxckpt.repeated_flops_ratio <= self.peer.repeated_flops_ratio


@dataclass(frozen=True)
class Comparison:
    """All peers on a model.

    Attributes:
        model: its name.
        plain_peak_bytes: peak of the plain step [B].
        static_bytes: the part of any peak that is there before the step [B].
        floor_bytes: the lowest peak that fxckpt reaches [B].
        rivals: the peers.
    """

    model: str
    plain_peak_bytes: int
    static_bytes: int
    floor_bytes: int
    rivals: tuple[Rival, ...]

    @property
    def lowest_peak_bytes(self) -> int:
        """The lowest peak of any peer [B]."""
        return min(rival.peer.peak_bytes for rival in self.rivals)

    @property
    def is_met(self) -> bool:
        """Whether fxckpt repeats no more FLOPs anywhere, and its floor is below all peers' peaks."""
        return all(rival.is_met for rival in self.rivals) and self.floor_bytes < self.lowest_peak_bytes


def compare(subject: Subject, budgets: Sequence[float], *, quick: bool) -> Comparison:
    """Capture a model, put the peers on its graph, and plan at their peaks."""
    model, args, kwargs = (subject.quick if quick else subject.full).build()
    profile = build(capture(model, args, kwargs), estimated(DEVICES["cpu"]))
    graph = profile.graph
    costs = {name: Cost.of(graph, s) for name, s in _peers(profile, list(subject.paths(model)), budgets)}
    ours = [Cost.of(graph, schedule) for schedule in _plans(graph, costs.values())]
    rivals = tuple(Rival(name, cost, _best(ours, cost.peak_bytes)) for name, cost in costs.items())
    plain_peak_bytes = simulate(graph, plain(graph)).peak_bytes
    return Comparison(subject.name, plain_peak_bytes, graph.static_bytes, _floor_bytes(graph), rivals)


def _peers(profile: Profile, blocks: list[str], budgets: Sequence[float]) -> Iterator[tuple[str, Schedule]]:
    yield from by_hand(profile.graph, blocks)
    for budget in tqdm(budgets, "torch's planner", leave=False):
        yield f"activation_memory_budget {budget:g}", torch_planner(profile, budget)


def _plans(graph: Graph, costs: Iterable[Cost]) -> Iterator[Schedule]:
    """fxckpt's schedules for the peaks of the peers that no other peer beats."""
    distinct = set(costs)
    efficient = [cost for cost in distinct if not any(other.beats(cost) for other in distinct)]
    for cost in tqdm(sorted(efficient, key=lambda cost: cost.peak_bytes), "fxckpt", leave=False):
        try:
            yield solve(_in_flops(graph), cost.peak_bytes).schedule
        except InfeasibleBudgetError:
            continue


def _in_flops(graph: Graph) -> Graph:
    return replace(graph, ops=tuple(replace(op, time_us=op.flops + op.time_us * 1e-6) for op in graph.ops))


def _best(costs: Sequence[Cost], peak_bytes: int) -> Cost | None:
    fitting = [cost for cost in costs if cost.peak_bytes <= peak_bytes]
    return min(fitting, key=lambda cost: (cost.repeated_flops_ratio, cost.peak_bytes), default=None)


def _floor_bytes(graph: Graph) -> int:
    try:
        return solve(_in_flops(graph), 0).timeline.peak_bytes
    except InfeasibleBudgetError as error:
        return error.floor_bytes


def section(comparison: Comparison) -> str:
    """A model's peers as a table in Markdown."""
    rows = [
        (rival.name, *_cells(rival.peer), *_cells(rival.fxckpt), "yes" if rival.is_met else "**no**")
        for rival in comparison.rivals
    ]
    headers = ("peer", "peak MiB", "repeats FLOPs %", "fxckpt: peak MiB", "repeats FLOPs %", "no more")
    return (
        f"## {comparison.model}\n\nPlain peak {_mib(comparison.plain_peak_bytes)} MiB, of which "
        f"{_mib(comparison.static_bytes)} are there before the step. Lowest peak: fxckpt "
        f"{_mib(comparison.floor_bytes)}, the others {_mib(comparison.lowest_peak_bytes)} MiB.\n\n"
        + tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        + "\n"
    )


def _cells(cost: Cost | None) -> tuple[str, str]:
    return ("–", "–") if cost is None else (_mib(cost.peak_bytes), f"{100 * cost.repeated_flops_ratio:.2f}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f}"


def write(folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Write `torch_planner.json` and `torch_planner.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    data = {"versions": versions, "models": [asdict(c) for c in comparisons]}
    (folder / "torch_planner.json").write_text(json.dumps(data, indent=1) + "\n")
    intro = "# FLOPs repeated at the same peak, by one simulator\n\nWritten by `python -m benchmarks.torch_planner`"
    text = "\n".join(section(c) for c in comparisons)
    (folder / "torch_planner.md").write_text(f"{intro}, torch {torch.__version__}.\n\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"names of models; by default {', '.join(MODELS)}")
    parser.add_argument("--quick", action="store_true", help="small models, fewer budgets")
    parser.add_argument("--budgets", type=int, default=10, help="into how many steps 0 to 1 is divided")
    parser.add_argument("--output", type=Path, help="folder for the tables")
    options = parser.parse_args()
    count = 4 if options.quick else options.budgets
    budgets = sorted({*(round(i / count, 4) for i in range(count + 1)), *NEAR_ZERO})
    comparisons: list[Comparison] = []
    for subject in subjects(options.models or list(MODELS)):
        comparisons.append(compare(subject, budgets, quick=options.quick))
        print(section(comparisons[-1]), flush=True)
        if options.output is not None:
            write(options.output, comparisons)
    sys.exit(not all(c.is_met for c in comparisons))


if __name__ == "__main__":
    main()
