"""How long does planning take, and how does it grow with depth?

    python -m benchmarks.planning_time [--depths 4 8 16 32 64 126] [--output benchmarks/results/planning_time.json]
    python -m benchmarks.planning_time --stages

First all of `fxckpt.plan`, capture included, for Llama 3 with eight billion parameters on the meta device. Then,
capture aside, Llama-like stacks of growing depth at half of the plain peak with effort "fast", and the frozen graphs
with "fast" and "default"; gradients are allocated. With --stages instead: where the time of `optimize` goes, stage by
stage, for a Llama of 1.3 billion parameters on the meta device (nothing can be measured there, so its costs are
estimates) and, at 0.8 of the plain peak, a ResNet-50 whose ops are measured, once with nothing known and once from
memory. Times are CPU time of this process [s], in one thread, so a busy machine disturbs them little; `memory_gib` is
the most that the process has held so far.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

import fxckpt
from benchmarks.models.cases import case
from benchmarks.models.zoo import llama, llama3_8b, llama_1b
from benchmarks.optimality import GRAPHS, Problem
from fxckpt.capture.joint import capture
from fxckpt.core.graph import Graph
from fxckpt.core.solvers import solve
from fxckpt.options import read_options
from fxckpt.pipeline import make_plan, profile_of
from fxckpt.rewrite.backends import python
from fxckpt.rewrite.verify import verify

FRACTION = 0.5
FROZEN = ("gpt12", "llama12", "mlp32", "resmlp1000", "resnet50", "unet4")


def stacks(depths: list[int]) -> Iterator[tuple[str, int, Graph]]:
    """Name, depth and graph of Llama-like stacks."""
    for depth in depths:
        model, (args, kwargs) = llama(depth, 64, 172, 64, 1)
        plan = fxckpt.plan(model, 2**62, example_inputs=args, example_kwargs=kwargs, cost_model="reference")
        yield f"llama, {depth} layers", depth, plan.graph.with_gradients(True)


def frozen() -> Iterator[tuple[str, None, Graph]]:
    for name in FROZEN:
        yield name, None, Graph.from_dict(json.loads((GRAPHS / f"{name}.json").read_text())).with_gradients(True)


def timed(name: str, depth: int | None, graph: Graph, effort: str) -> dict[str, Any]:
    """CPU time of one plan [s]."""
    problem = Problem(name, "allocated" if graph.gradients_allocated else "fresh", graph)
    budget_bytes = problem.budget_bytes(FRACTION)
    start = time.process_time()
    timeline = solve(graph, budget_bytes, "dp", effort=effort).timeline
    seconds = time.process_time() - start
    overhead = problem.percent(timeline.recompute_us)
    return {
        "graph": name,
        "layers": depth,
        "ops": len(graph.ops),
        "effort": effort,
        "cpu_s": seconds,
        "overhead_percent": overhead,
        "memory_gib": memory_gib(),
    }


def memory_gib() -> float:
    """The most memory that this process has held [GiB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def whole() -> dict[str, Any]:
    """Capture and plan Llama 3 8B."""
    model, (args, kwargs) = llama3_8b()
    start = time.process_time()
    plan = fxckpt.plan(model, FRACTION, example_inputs=args, example_kwargs=kwargs)
    return {
        "graph": "Llama 3 8B, with capture",
        "layers": 32,
        "ops": len(plan.graph.ops),
        "effort": "auto",
        "cpu_s": time.process_time() - start,
        "overhead_percent": 100 * plan.predicted.recompute_us / plan.baseline.step_us,
        "memory_gib": memory_gib(),
    }


def stages(name: str, model: nn.Module, args: Any, kwargs: Any, ratio: float, **given: Any) -> dict[str, Any]:
    """CPU time of each stage of planning a step [s]."""
    options = read_options(ratio, given, run_ops=given.get("cost_model") == "measure")
    times = [time.process_time()]

    def lap(result: Any) -> Any:
        times.append(time.process_time())
        return result

    joint = lap(capture(model, args, kwargs))
    profile = lap(profile_of(joint, options, model.parameters(), gradients_allocated=False))
    plan = lap(make_plan(profile, options))
    executable = lap(python.executable(profile, plan.timeline))
    lap(verify(profile, plan.timeline, executable))
    names = ("capture_s", "profile_s", "solve_s", "rewrite_s", "verify_s")
    laps = [end - start for start, end in pairwise(times)]
    return {
        "model": name,
        "ops": len(plan.graph.ops),
        "distinct": len({op.signature for op in plan.graph.ops}),
        **dict(zip(names, laps, strict=True)),
        "sum_s": sum(laps),
    }


def all_stages() -> list[dict[str, Any]]:
    """The rows of --stages."""
    model, (args, kwargs) = llama_1b()
    rows = [stages("Llama, 1.3 B", model, args, kwargs, FRACTION, cost_model="estimate")]
    model, args, kwargs = case("resnet50").build()
    for state in ("nothing known", "costs known"):
        rows.append(stages(f"ResNet-50, {state}", model, args, kwargs, 0.8, cost_model="measure", cost_cache="off"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 126])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stages", action="store_true", help="where the time of planning goes")
    arguments = parser.parse_args()
    if arguments.stages:
        print(tabulate(all_stages(), headers="keys", floatfmt=".2f"))
        return
    results = [whole()]
    results += [timed(name, depth, graph, "fast") for name, depth, graph in stacks(arguments.depths)]
    for name, depth, graph in frozen():
        efforts = ("fast",) if len(graph.ops) > 3000 else ("fast", "default")
        results += [timed(name, depth, graph, effort) for effort in efforts]
    for result in results:
        result["cpu_ms_per_op"] = 1000 * result["cpu_s"] / result["ops"]
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    if arguments.output:
        machine = {"processor": platform.machine(), "python": platform.python_version()}
        arguments.output.parent.mkdir(exist_ok=True)
        data = {"machine": machine, "budget_ratio": FRACTION, "results": results}
        arguments.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
