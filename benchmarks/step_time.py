"""Does an optimized module cost time where there is memory enough? Its step against the plain model's, budgets apart.

    python -m benchmarks.step_time [--runs 15] [--budgets 2.0 0.7 0.5] [--output benchmarks/results/step_time.json]
    [case …]

Both sides run in turn in one process; the ratio is that of medians, its spread the quartiles of the ratios of
neighbours. A budget is a fraction of the plain peak by simulation; above 1 nothing is repeated. Peaks are measured,
above what is there before the step.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxckpt
from fxckpt.api import plan_of
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.memory import peak_allocated_bytes
from tests.models import FULL, Case

HEADERS = ("case", "budget", "time ratio", "quartiles", "peak MiB", "plain peak MiB", "repeated ops")


def stepper(case: Case, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    """One training step with gradients fresh."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        case.loss(model(*args, **kwargs)).backward()

    return step


def compare(case: Case, budget: float, runs: int) -> dict[str, Any] | None:
    """Times and peaks of the plain and the optimized step, interleaved; None if the budget is below the floor."""
    plain, args, kwargs = case.build()
    twin = copy.deepcopy(plain)
    peak_bytes = fxckpt.plan(twin, 2**62, example_inputs=args, example_kwargs=kwargs).baseline.peak_bytes
    optimized = fxckpt.optimize(twin, int(budget * peak_bytes))
    steps = stepper(case, plain, args, kwargs), stepper(case, optimized, args, kwargs)
    try:
        for step in steps * 2:
            step()
    except InfeasibleBudgetError:
        return None
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        for side in (0, 1) if run % 2 else (1, 0):
            start = time.perf_counter()
            steps[side]()
            times[side].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    for model in (plain, optimized):
        model.zero_grad(set_to_none=True)
    peaks = [peak_allocated_bytes(step, torch.device("cpu")) for step in steps]
    plan = plan_of(optimized)
    return {
        "case": case.name,
        "budget_ratio": budget,
        "time_ratio": statistics.median(times[1]) / statistics.median(times[0]),
        "time_ratio_quartiles": [quartiles[0], quartiles[2]],
        "plain_step_us": statistics.median(times[0]) * 1e6,
        "peak_bytes": peaks[1],
        "plain_peak_bytes": peaks[0],
        "repeats": sum(plan.schedule.repeats().values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all by default")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for case in FULL:
        if options.cases and case.name not in options.cases:
            continue
        for budget in options.budgets:
            result = compare(case, budget, options.runs)
            if result is None:
                print(f"{case.name}: {budget} is below the floor", flush=True)
                continue
            results.append(result)
            print(tabulate([_row(result)], HEADERS if len(results) == 1 else (), tablefmt="plain"), flush=True)
    if options.output is not None:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "runs": options.runs,
        }
        options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def _row(result: dict[str, Any]) -> list[str]:
    low, high = result["time_ratio_quartiles"]
    return [
        result["case"],
        f"{result['budget_ratio']:.2f}",
        f"{result['time_ratio']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{result['peak_bytes'] / 2**20:.1f}",
        f"{result['plain_peak_bytes'] / 2**20:.1f}",
        str(result["repeats"]),
    ]


if __name__ == "__main__":
    main()
