"""Plans that run fused, against `torch.compile`: how long does a step take in the measured peak of each?

    python -m benchmarks.fused [--runs 9] [--quick] [--output benchmarks/results] [model …]

Everything is compiled, on both sides: `torch.compile` with settings of `activation_memory_budget`, `torch.compile` of
the model with `checkpoint` around every block, and fxckpt with `backend="inductor"` in the measured peak of each. All
steps of a model run in turn in one process; times are ratios to eager's in the same round. Peaks are measured,
everything counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxckpt
from benchmarks.models.cases import Case
from benchmarks.models.training import clear_gradients
from benchmarks.peers.eager import Forward, applied, fused, peers
from benchmarks.peers.subjects import Subject, subjects
from fxckpt.api import plan_of
from fxckpt.errors import InfeasibleBudgetError, OverBudgetWarning
from fxckpt.steps.comparison import Ratio
from fxckpt.steps.step import TrainingStep, timed_in_turn

BUDGETS = (1.0, 0.5, 0.1)
HEADERS = ("model", "what", "peak MiB", "time over eager's", "predicted MiB", "repeated ops")


@dataclass(frozen=True)
class Row:
    """A way to run a step of a model.

    Attributes:
        what: its name.
        peer: the row in whose measured peak it was planned, "" for what isn't ours.
        peak_bytes: measured, all that is in use counted [B].
        time_ratio: over eager's.
        predicted_bytes: the plan's peak [B]; None where there is no plan.
        repeats: how many ops are run again; None where there is no plan.
    """

    what: str
    peer: str
    peak_bytes: int
    time_ratio: Ratio
    predicted_bytes: int | None = None
    repeats: int | None = None


def ways(subject: Subject, case: Case) -> Iterator[tuple[str, Callable[[nn.Module], Forward]]]:
    """What torch offers, compiled."""
    model, *_ = case.build()
    yield "eager", lambda model: model
    for budget in BUDGETS:
        yield f"torch.compile, activation_memory_budget {budget:g}", lambda model, budget=budget: fused(model, budget)
    every = next(p for p in peers(model, list(subject.paths(model)), subject.is_chain, ()) if p.name.endswith(" 1"))
    yield "torch.compile of checkpoint every block", lambda model: fused(every.apply(model), 1.0)


def rows_of(subject: Subject, case: Case, runs: int) -> list[Row]:
    """The table of a model."""
    steps: dict[str, TrainingStep] = {}
    peaks: dict[str, int] = {}
    plans: dict[str, tuple[str, int, int]] = {}
    for what, apply in ways(subject, case):
        torch.compiler.reset()
        steps[what] = applied(case, apply)
        peaks[what] = _peak_bytes(steps[what])
        print(f"{case.name}: {what} {peaks[what] / 2**20:.1f} MiB", flush=True)
    for what in list(steps)[1:]:
        ours = f"fxckpt in the peak of {what}"
        step = applied(case, lambda model, what=what: fxckpt.optimize(model, peaks[what], backend="inductor"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OverBudgetWarning)  # the peak is in the table
                peaks[ours] = _peak_bytes(step)
        except InfeasibleBudgetError as error:
            print(f"{case.name}: {ours}: the floor is {error.floor_bytes / 2**20:.1f} MiB", flush=True)
            continue
        plan = plan_of(step.forward)  # type: ignore[arg-type]
        steps[ours] = step
        plans[ours] = what, plan.peak_bytes, sum(plan.schedule.repeats().values())
        print(f"{case.name}: {ours} {peaks[ours] / 2**20:.1f} MiB", flush=True)
    times = dict(zip(steps, timed_in_turn(list(steps.values()), runs), strict=True))
    rows = []
    for what in steps:
        peer, predicted_bytes, repeats = plans.get(what, ("", None, None))
        ratio = Ratio.of(times[what], times["eager"])
        rows.append(Row(what, peer, peaks[what], ratio, predicted_bytes, repeats))
    return rows


def _peak_bytes(step: TrainingStep) -> int:
    """The peak of a warm step whose gradients are fresh [B]."""
    for _ in range(2):
        clear_gradients(step.model)
        step.run()
    clear_gradients(step.model)
    return step.resident_bytes() + step.allocated_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of models; all by default")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the same architectures, small")
    parser.add_argument("--output", type=Path, help="folder for fused.json")
    options = parser.parse_args()
    found: dict[str, list[Row]] = {}
    for subject in subjects(options.models):
        case = copy.copy(subject.quick if options.quick else subject.full)
        found[case.name] = rows_of(subject, case, options.runs)
        print(tabulate(_cells(case.name, found[case.name]), HEADERS, tablefmt="github"), flush=True)
        if options.output is not None:
            _write(options.output / "fused.json", found)


def _cells(name: str, rows: list[Row]) -> list[list[Any]]:
    return [
        [
            name,
            row.what,
            f"{row.peak_bytes / 2**20:.1f}",
            str(row.time_ratio),
            "" if row.predicted_bytes is None else f"{row.predicted_bytes / 2**20:.1f}",
            "" if row.repeats is None else row.repeats,
        ]
        for row in rows
    ]


def _write(path: Path, found: dict[str, list[Row]]) -> None:
    """Write results; those of other models stay."""
    before = json.loads(path.read_text())["models"] if path.exists() else {}
    models = before | {name: [asdict(row) for row in rows] for name, rows in found.items()}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({"machine": machine, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
