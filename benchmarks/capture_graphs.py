"""Freeze the graphs of models as data, with times by the cost model "reference".

    python -m benchmarks.capture_graphs [case …]

Writes `benchmarks/graphs/CASE.json`; `benchmarks/optimality.py` reads them, without torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import fxckpt
from benchmarks.models.cases import FULL
from benchmarks.models.zoo import CASES
from fxckpt.core.graph import Graph

GRAPHS = Path(__file__).parent / "graphs"


def anonymous(graph: Graph) -> Graph:
    """The graph with file names instead of paths in its sources."""
    return replace(graph, ops=tuple(replace(op, source=op.source.rpartition("/")[2]) for op in graph.ops))


def main(names: list[str]) -> None:
    GRAPHS.mkdir(exist_ok=True)
    for case in (*FULL, *CASES):
        if names and case.name not in names:
            continue
        model, args, kwargs = case.build()
        plan = fxckpt.plan(model, 2**62, example_inputs=args, example_kwargs=kwargs, cost_model="reference")
        path = GRAPHS / f"{case.name}.json"
        path.write_text(json.dumps(anonymous(plan.graph).to_dict(), separators=(",", ":")) + "\n")
        print(f"{path.name}: {len(plan.graph.ops)} ops")


if __name__ == "__main__":
    main(sys.argv[1:])
