"""How close to the optimum are the plans? Overhead at fractions of the plain peak, for each frozen graph.

    python -m benchmarks.optimality [--effort default] [--output benchmarks/results/optimality] [graph …]

A fraction is of the plain step's peak, parameters, inputs and outputs not counted. Gradients are counted as `fresh`, as
`allocated` before the step (then they are held twice until they are handed over), or `in place`: allocated, and added
to at once, at no memory, as the reference counts. Rows:

    fxckpt        recompute time over the time of the plain step [%], and the smallest fraction that the solver reaches
    reference     what an earlier prototype reached (`reference_frontier.json`)
    … its bound   what it proved for schedules that keep backward's order
    lower bound   of all schedules that keep backward's order (`lower_bound.py`); fxckpt may change it, so may be below
    … any order   of all schedules

The reference had graphs like `gpt12_copies`, with a copy where eager's dropout does nothing (so AOTAutograd traces it),
and `llama12_slices`; `gpt12` and `llama12` are what fxckpt captures.

Times are by the cost model with which the graph was frozen; `s` is CPU time a plan. Graphs are files in
`benchmarks/graphs`, or paths. With --output the table is written there as .md and the figures as .json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.lower_bound import LowerBound
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import SOLVERS, solve
from fxckpt.errors import InfeasibleBudgetError

FRACTIONS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2)
ACCOUNTINGS = ("fresh", "allocated", "in place")
GRAPHS = Path(__file__).parent / "graphs"
REFERENCE = json.loads((Path(__file__).parent / "reference_frontier.json").read_text())


@dataclass(frozen=True)
class Problem:
    """A graph under one accounting; fractions count from `fixed_bytes` to the plain peak."""

    name: str
    accounting: str
    graph: Graph

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are not part of a fraction: what is there all the time, and outputs."""
        return self.graph.static_bytes + self.graph.bytes_of(self.graph.outputs)

    @property
    def span_bytes(self) -> int:
        return simulate(self.graph, plain(self.graph)).peak_bytes - self.fixed_bytes

    def budget_bytes(self, fraction: float) -> int:
        return self.fixed_bytes + int(fraction * self.span_bytes)

    def ratio(self, peak_bytes: int) -> float:
        return (peak_bytes - self.fixed_bytes) / self.span_bytes

    def percent(self, time_us: float) -> float:
        return 100 * time_us / self.graph.step_us


def accounted(graph: Graph, accounting: str) -> Graph:
    """The graph with gradients counted in one of `ACCOUNTINGS`."""
    graph = graph.with_gradients(accounting != "fresh")
    if accounting != "in place":
        return graph
    gradients = frozenset(graph.gradients)
    storages = (replace(s, size_bytes=0) if i in gradients else s for i, s in enumerate(graph.storages))
    return replace(graph, storages=tuple(storages))


def problems(graphs: list[str], accountings: list[str] | None) -> list[tuple[str, str]]:
    """Which graphs to look at, and how gradients are counted in each: as the reference does where nothing is said."""
    measured = [(name, accounting) for name, _, accounting in (key.partition(" ") for key in REFERENCE["floor_ratio"])]
    known = [("gpt12", "fresh"), ("llama12", "fresh"), *measured]
    if accountings:
        return [(name, accounting) for name in graphs or dict(known) for accounting in accountings]
    return [pair for pair in known if not graphs or pair[0] in graphs]


def ours(problem: Problem, solver: str, options: dict[str, str]) -> dict[str, Any]:
    """Overheads [%], None below the floor; the floor; CPU time a plan [s]."""
    start, cells = time.process_time(), list[float | None]()
    for fraction in FRACTIONS:
        try:
            timeline = solve(problem.graph, problem.budget_bytes(fraction), solver, **options).timeline
            cells.append(problem.percent(timeline.recompute_us))
        except InfeasibleBudgetError:
            cells.append(None)
    seconds = (time.process_time() - start) / len(FRACTIONS)
    try:
        floor_bytes = solve(problem.graph, 0, solver, **options).timeline.peak_bytes
    except InfeasibleBudgetError as error:
        floor_bytes = error.floor_bytes
    return {"row": "fxckpt", "overhead_percent": cells, "floor_ratio": problem.ratio(floor_bytes), "cpu_s": seconds}


def bound(problem: Problem, row: str, *, keep_order: bool) -> dict[str, Any]:
    """The same figures of a lower bound."""
    lowest = LowerBound(problem.graph, keep_order=keep_order)
    times = (lowest.recompute_us(problem.budget_bytes(fraction)) for fraction in FRACTIONS)
    cells = [None if time_us is None else problem.percent(time_us) for time_us in times]
    return {"row": row, "overhead_percent": cells, "floor_ratio": problem.ratio(lowest.floor_bytes())}


def rows(problem: Problem, solver: str, options: dict[str, str]) -> Iterator[dict[str, Any]]:
    """All rows of one problem."""
    yield ours(problem, solver, options)
    key = f"{problem.name} {problem.accounting}"
    if key in REFERENCE["floor_ratio"]:
        yield {"row": "reference"} | {kind: REFERENCE[kind][key] for kind in ("overhead_percent", "floor_ratio")}
        yield {"row": "… its bound", "overhead_percent": REFERENCE["bound_percent"][key], "floor_ratio": None}
    yield bound(problem, "lower bound", keep_order=True)
    yield bound(problem, "… any order", keep_order=False)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    headers = ("graph", "gradients", "", *map(str, FRACTIONS), "floor", "s")
    lines = []
    for result in results:
        cells = ("–" if cell is None else f"{cell:.2f}" for cell in result["overhead_percent"])
        seconds = f"{result['cpu_s']:.1f}" if "cpu_s" in result else ""
        names = result["graph"], result["gradients"], result["row"]
        floor = "" if result["floor_ratio"] is None else f"{result['floor_ratio']:.3f}"
        lines.append((*names, *cells, floor, seconds))
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="*", help="names in benchmarks/graphs, or paths; default: as the reference")
    parser.add_argument("--solver", default="dp")
    parser.add_argument("--effort", default="default", help="for dp, auto and min_memory: fast, default or max")
    parser.add_argument("--gradients", nargs="+", choices=ACCOUNTINGS, help="default: as the reference")
    parser.add_argument("--output", type=Path, help="without suffix")
    arguments = parser.parse_args()
    options = {"effort": arguments.effort} if SOLVERS[arguments.solver].searches else {}
    results = []
    for name, accounting in tqdm(problems(arguments.graphs, arguments.gradients)):
        path = Path(name) if Path(name).exists() else GRAPHS / f"{name}.json"
        graph = accounted(Graph.from_dict(json.loads(path.read_text())), accounting)
        problem = Problem(path.stem, accounting, graph)
        results += [
            {"graph": path.stem, "gradients": accounting} | row for row in rows(problem, arguments.solver, options)
        ]
    print(table(results))
    if arguments.output:
        machine = {"processor": platform.machine(), "python": platform.python_version()}
        data = {"solver": arguments.solver, **options, "machine": machine, "fractions": FRACTIONS, "results": results}
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        heading = f"Solver {arguments.solver}, effort {arguments.effort}; written by benchmarks/optimality.py.\n\n"
        arguments.output.with_suffix(".md").write_text(heading + table(results) + "\n")


if __name__ == "__main__":
    main()
