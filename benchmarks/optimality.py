"""How close to the optimum are the plans? Overhead at fractions of the plain peak, for each frozen graph.

    python benchmarks/optimality.py [--effort default] [--solver dp] [graph …]

A fraction is of the plain step's peak, parameters, inputs and outputs not counted. For each graph there are two rows:
gradients fresh, and gradients already allocated. Overhead is recompute time over the time of the plain step [%], by the
cost model with which the graph was frozen; `floor` is the smallest fraction that the solver reaches; `s` is CPU time a
plan. Graphs are files in `benchmarks/graphs`, or paths.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

from fxckpt.errors import InfeasibleBudgetError
from fxckpt.graph import Graph
from fxckpt.schedule import plain
from fxckpt.simulate import simulate
from fxckpt.solvers import solve

FRACTIONS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2)
GRAPHS = Path(__file__).parent / "graphs"


def fixed_bytes(graph: Graph) -> int:
    """Bytes that are not part of a fraction: what is there all the time, and outputs."""
    return graph.static_bytes + sum(graph.storages[s].size_bytes for s in graph.outputs)


def row(graph: Graph, solver: str, options: dict[str, str]) -> str:
    """Overheads, floor and time as one row of a Markdown table."""
    fixed = fixed_bytes(graph)
    span = simulate(graph, plain(graph)).peak_bytes - fixed
    start = time.process_time()
    cells = []
    for fraction in FRACTIONS:
        try:
            timeline = solve(graph, fixed + int(fraction * span), solver, **options).timeline
            cells.append(f"{100 * timeline.recompute_us / graph.step_us:.2f}")
        except InfeasibleBudgetError:
            cells.append("–")
    seconds = (time.process_time() - start) / len(FRACTIONS)
    return " | ".join((*cells, f"{floor(graph, solver, options):.3f}", f"{seconds:.1f}"))


def floor(graph: Graph, solver: str, options: dict[str, str]) -> float:
    """The smallest fraction that the solver reaches."""
    fixed = fixed_bytes(graph)
    peak_bytes = simulate(graph, plain(graph)).peak_bytes
    try:
        lowest_bytes = solve(graph, 0, solver, **options).timeline.peak_bytes
    except InfeasibleBudgetError as error:
        lowest_bytes = error.floor_bytes
    return (lowest_bytes - fixed) / (peak_bytes - fixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="*", help="names in benchmarks/graphs, or paths; all of them by default")
    parser.add_argument("--solver", default="dp")
    parser.add_argument("--effort", default="default", help="for dp, auto and min_memory: fast, default or max")
    arguments = parser.parse_args()
    paths = [Path(g) if Path(g).exists() else GRAPHS / f"{g}.json" for g in arguments.graphs]
    options = {"effort": arguments.effort} if arguments.solver in ("dp", "auto", "min_memory") else {}
    print(f"{arguments.solver} {options or ''} on {platform.machine()}, Python {platform.python_version()}\n")
    print(f"| graph | gradients | {' | '.join(map(str, FRACTIONS))} | floor | s |")
    print("|---|---|" + "---|" * (len(FRACTIONS) + 2))
    for path in paths or sorted(GRAPHS.glob("*.json")):
        graph = Graph.from_dict(json.loads(path.read_text()))
        for allocated in (False, True):
            cells = row(graph.with_gradients(allocated), arguments.solver, options)
            print(f"| {path.stem} | {'allocated' if allocated else 'fresh'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
