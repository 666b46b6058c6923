"""Does an optimized module cost time where there is memory enough? Its step against the plain model's, budgets apart.

    python -m benchmarks.step_time [--runs 15] [--budgets 2.0 0.7 0.5] [--output benchmarks/results/step_time.json]
    [case …]

Both sides run in turn in one process (`fxckpt.steps.comparison`). A budget is a fraction of the plain peak by
simulation; above 1 nothing is repeated. Peaks are measured, everything counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxckpt
from benchmarks.models.cases import FULL, Case
from fxckpt.api import plan_of
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.steps.comparison import Comparison, compare
from fxckpt.steps.step import TrainingStep

HEADERS = ("case", "budget", "time ratio", "peak MiB", "plain peak MiB", "FLOPs ratio", "same bits", "repeated ops")


def compared(case: Case, budget: float, runs: int) -> tuple[Comparison, int] | None:
    """The plain and the optimized step, and how many ops it repeats; None if the budget is below the floor."""
    plain, args, kwargs = case.build()
    twin = copy.deepcopy(plain)
    peak_bytes = fxckpt.plan(twin, 2**62, example_inputs=args, example_kwargs=kwargs).baseline.peak_bytes
    optimized = fxckpt.optimize(twin, int(budget * peak_bytes))
    steps = (TrainingStep(model, args, kwargs, loss=case.loss) for model in (plain, optimized))
    try:
        comparison = compare(*steps, runs=runs)
    except InfeasibleBudgetError:
        return None
    return comparison, sum(plan_of(optimized).schedule.repeats().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all by default")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for case in FULL:
        if options.cases and case.name not in options.cases:
            continue
        for budget in options.budgets:
            found = compared(case, budget, options.runs)
            if found is None:
                print(f"{case.name}: {budget} is below the floor", flush=True)
                continue
            comparison, repeats = found
            row = [[case.name, f"{budget:.2f}", *_cells(comparison), repeats]]
            print(tabulate(row, () if results else HEADERS, tablefmt="plain"), flush=True)
            figures = json.loads(comparison.to_json())
            results.append({"case": case.name, "budget_ratio": budget, "repeats": repeats, **figures})
    if options.output is not None:
        _write(options.output, results)


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results; those of other cases stay if they were measured on such a machine too."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("machine") == machine:
        cases = {result["case"] for result in results}
        results = [result for result in before["results"] if result["case"] not in cases] + results
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def _cells(comparison: Comparison) -> list[str]:
    return [
        str(comparison.time_ratio),
        f"{comparison.optimized.peak_bytes / 2**20:.1f}",
        f"{comparison.plain.peak_bytes / 2**20:.1f}",
        f"{comparison.flops_ratio:.3f}",
        "yes" if comparison.same_bits else "NO",
    ]


if __name__ == "__main__":
    main()
