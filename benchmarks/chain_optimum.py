"""The fewest layers that an equal chain must repeat, exactly: what an MLP's plans at tight budgets are compared with.

    python -m benchmarks.chain_optimum [--fraction 0.2] [--output benchmarks/results/chain_optimum.json]

A layer is a product and a ReLU, as in the frozen graph `mlp32`; its activations are of one size, a unit. Gradients of
weights take none (they are added in place). Backward keeps its order: for each layer the ReLU's gradient, then the
input's and the weight's, in either order. Anything may be dropped and made again, at any time; to keep a product
instead of its ReLU is never better.

The search is A* (Hart, Nilsson, Raphael 1968) over what is stored and how far backward is. What is still to be made
again is bounded from below by what each gap between stored activations costs alone, with as many units as there could
be for it (the closed form of Griewank and Walther 2000).
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path

from benchmarks.optimality import GRAPHS, Problem, accounted
from fxckpt.core.graph import Graph
from fxckpt.core.solvers import solve
from fxckpt.core.solvers.baselines.treeverse import forward_steps

_State = tuple[int, int, int]
"""Layer, phase of its backward, and the stored activations as bits.

Phases: 0 the gradient of the layer's result is there; 1 that of its product; 2 that of its input too, the weight's is
not; 3 the weight's is done, the input's not.
"""

_HELD = (1, 1, 2, 1)  # units that gradients take in each phase


def fewest_repeats(layers: int, units: int, most: int) -> int | None:
    """How many layers' forward must run again.

    Args:
        layers: number of layers; the chain's input is there all the time and not counted.
        units: how many activations fit the memory, gradients of activations included.
        most: of schedules with more repeats nothing is asked.

    Returns:
        The minimum over all schedules that keep backward's order, or None if it is more than `most`.
    """
    search = _Search(layers, units)
    queue: list[tuple[int, int, _State]] = []
    best: dict[_State, int] = {}
    for state in search.starts():
        best[state] = 0
        heapq.heappush(queue, (search.bound(state), 0, state))
    while queue:
        _, repeats, state = heapq.heappop(queue)
        if repeats > best[state]:
            continue
        if state[:2] == (0, 1):  # the first layer's weight needs the chain's input only
            return repeats
        for cost, following in search.moves(state):
            reached = repeats + cost
            if reached < best.get(following, most + 1):
                bound = reached + search.bound(following)
                if bound <= most:
                    best[following] = reached
                    heapq.heappush(queue, (bound, reached, following))
    return None


class _Search:
    def __init__(self, layers: int, units: int) -> None:
        self.layers, self.units = layers, units

    def starts(self) -> Iterator[_State]:
        """What forward may leave: the last activation, and as many others as there is room for."""
        last = self.layers - 1
        for kept in combinations(range(last), min(self.units - 3, last)):
            yield last, 0, sum(1 << number for number in kept) | 1 << last

    def bound(self, state: _State) -> int:
        """Repeats that are still needed at least."""
        layer, phase, stored = state
        total = gap = 0
        for number in range(layer + 1 if phase == 0 else layer):
            if stored >> number & 1:
                total, gap = total + _alone(gap, self.units - 3), 0
            else:
                gap += 1
        return total + _alone(gap, self.units - 3)

    def moves(self, state: _State) -> Iterator[tuple[int, _State]]:
        """Repeats made, and the state after: a step of backward, an activation dropped, a layer run again."""
        layer, phase, stored = state
        count, held = stored.bit_count(), _HELD[phase]
        has_input = bool(stored >> (layer - 1) & 1) if layer else True
        fits = count + 2 <= self.units
        if phase == 0 and stored >> layer & 1 and fits:
            yield 0, (layer, 1, stored & ~(1 << layer))
        if phase == 1 and fits:
            yield 0, (layer, 2, stored)
        if phase == 1 and has_input:
            yield 0, (layer, 3, stored)
        if (phase == 2 and has_input) or (phase == 3 and fits):
            yield 0, (layer - 1, 0, stored)
        for number in range(self.layers):
            if stored >> number & 1:
                yield 0, (layer, phase, stored & ~(1 << number))
        if count + 1 + held > self.units:  # the product of a repeated layer
            return
        for number in range(layer + 1 if phase == 0 else layer):
            source = number == 0 or stored >> (number - 1) & 1
            if stored >> number & 1 or not source:
                continue
            made = stored | 1 << number
            if count + 2 + held <= self.units:
                yield 1, (layer, phase, made)
            if number and count + 1 + held <= self.units:  # its input goes before the ReLU runs
                yield 1, (layer, phase, made & ~(1 << (number - 1)))


@cache
def _alone(missing: int, units: int) -> int:
    """Repeats to have each of so many missing activations, the last first, what is before them being stored."""
    return forward_steps(missing + 1, units + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.2, help="budget as a fraction of the plain peak")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    graph = accounted(Graph.from_dict(json.loads((GRAPHS / "mlp32.json").read_text())), "in place")
    problem = Problem("mlp32", "in place", graph)
    budget_bytes = problem.budget_bytes(arguments.fraction)
    timeline = solve(graph, budget_bytes, "dp").timeline
    layers = [number for number, op in enumerate(graph.ops[: graph.forward_count]) if "relu" in op.target]
    unit_bytes = graph.storages[graph.ops[layers[0]].writes[0]].size_bytes
    units = (budget_bytes - problem.fixed_bytes) // unit_bytes
    repeated = timeline.schedule.repeats()
    found = sum(repeated.get(number, 0) for number in layers)
    figures = {
        "graph": problem.name,
        "fraction": arguments.fraction,
        "units": units,
        "repeated_layers": found,
        "overhead_percent": problem.percent(timeline.recompute_us),
        "fewest_repeated_layers": fewest_repeats(len(layers), units, found),
    }
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
