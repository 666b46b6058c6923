"""Time against peak memory: fxckpt at ten budgets, and everything that torch itself offers.

    python -m benchmarks.frontier [--quick] [--runs 15] [--output benchmarks/results] [model …]

For every point: the measured peak (parameters, gradients, inputs and all that kernels allocate), the step's time over
that of the plain model, FLOPs of matrix products, convolutions and attention over the plain model's, and the largest
difference of any gradient to the plain model's. For each peer also fxckpt with the peer's measured peak as its budget;
the two and the plain model are timed in turn. A ratio of times is the median of the ratios of runs of the same round,
with their quartiles.

`--quick` takes small models and fewer peers and times nothing: its figures are the same on every run. Either way the
exit status is 1 if fxckpt exceeds a budget anywhere, gives other gradients than the plain model, or can't reach the
peak of a peer. The results of a model are written as soon as they are there, to `frontier_MODEL.json`, `.md` and
(if times were taken) `.svg`.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

import fxckpt
from benchmarks.frontier_report import Point, Result, Rival, table, write
from benchmarks.models.cases import Case
from benchmarks.peers.eager import Forward, Peer, applied, peers, run_flops
from benchmarks.peers.subjects import Subject, subjects
from fxckpt.api import plan_of
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.steps.comparison import Ratio, gradients_of, largest_difference
from fxckpt.steps.step import TrainingStep, timed_in_turn

QUICK_MODELS = ("gpt12_dropout", "bert6", "unet4")
NO_LIMIT = 2**62
BESIDE_BYTES = 64
"""For what is in a step beside the model: the loss and its gradient."""


@dataclass(frozen=True)
class Scale:
    """How much to do.

    Attributes:
        runs: how often a step is timed; 0 where nothing is.
        budgets: in how many budgets fxckpt runs.
        settings: of torch's `activation_memory_budget`.
        options: for `fxckpt.optimize`.
    """

    runs: int
    budgets: int
    settings: tuple[float, ...]
    options: dict[str, Any]


FULL = Scale(15, 10, (0.0, 0.1, 0.2, 0.4, 0.7, 1.0), {})
QUICK = Scale(0, 3, (0.1,), {"cost_model": "reference", "effort": "fast"})


class Arena:
    """One model on which contenders are measured, with what is common to all of them."""

    def __init__(self, case: Case, scale: Scale) -> None:
        self._case, self._scale = case, scale
        self._plain = self._warm(lambda model: model)
        self._plain_gradients = gradients_of(self._plain)
        self._plain_flops = run_flops(self._plain)
        self.baseline = _plan(self._warm(self._optimized(NO_LIMIT))).baseline
        self.plain = self._point("plain", "plain", self._plain)

    def plain_step_us(self) -> float | None:
        """Median time of the plain step [µs]."""
        if not self._scale.runs:
            return None
        return statistics.median(timed_in_turn([self._plain], self._scale.runs)[0])

    def floor_bytes(self) -> int:
        """The lowest budget that fxckpt takes [B]."""
        try:
            self._warm(self._optimized(1))
        except InfeasibleBudgetError as error:
            return error.floor_bytes
        raise AssertionError("a model was planned in one byte")

    def fxckpt(self, budget_bytes: int) -> Point:
        """fxckpt with a bound on the whole peak."""
        step = self._warm(self._optimized(budget_bytes))
        point = self._ours(step, budget_bytes)
        if not self._scale.runs:
            return point
        plain, ours = timed_in_turn([self._plain, step], self._scale.runs)
        return replace(point, time=Ratio.of(ours, plain))

    def rival(self, peer: Peer) -> Rival:
        """A peer, and fxckpt with the peer's measured peak as its budget."""
        step = self._warm(peer.apply)
        theirs = self._point(peer.name, peer.family, step)
        steps = [self._plain, step]
        try:
            steps.append(self._warm(self._optimized(theirs.peak_bytes)))
            ours = self._ours(steps[-1], theirs.peak_bytes)
        except InfeasibleBudgetError:
            ours = None
        if not self._scale.runs:
            return Rival(theirs, ours)
        plain, *times = timed_in_turn(steps, self._scale.runs)
        theirs = replace(theirs, time=Ratio.of(times[0], plain))
        if ours is None:
            return Rival(theirs, None)
        return Rival(theirs, replace(ours, time=Ratio.of(times[1], plain)), Ratio.of(times[1], times[0]))

    def _optimized(self, budget_bytes: int) -> Callable[[nn.Module], Forward]:
        return functools.partial(
            fxckpt.optimize, memory_budget=budget_bytes, reserve=BESIDE_BYTES, **self._scale.options
        )

    def _warm(self, apply: Callable[[nn.Module], Forward]) -> TrainingStep:
        step = applied(self._case, apply)
        step.warm_up()
        return step

    def _ours(self, step: TrainingStep, budget_bytes: int) -> Point:
        point = self._point(f"fxckpt in {budget_bytes / 2**20:.2f} MiB", "fxckpt", step)
        return replace(point, budget_bytes=budget_bytes, predicted=_plan(step).predicted)

    def _point(self, name: str, family: str, step: TrainingStep) -> Point:
        peak_bytes = step.resident_bytes() + step.allocated_bytes()
        difference = largest_difference(gradients_of(step), self._plain_gradients)
        return Point(name, family, peak_bytes, run_flops(step) / self._plain_flops, difference)


def _plan(step: TrainingStep) -> fxckpt.Plan:
    assert isinstance(step.forward, nn.Module)
    return plan_of(step.forward)


def compete(subject: Subject, scale: Scale, case: Case) -> Result:
    """Measure fxckpt and all peers on a model."""
    arena = Arena(case, scale)
    lowest_bytes, highest_bytes = arena.floor_bytes(), arena.plain.peak_bytes
    model = case.build()[0]
    all_peers = list(peers(model, list(subject.paths(model)), subject.is_chain, scale.settings))
    with tqdm(total=scale.budgets + len(all_peers), desc=subject.name, leave=False, disable=None) as bar:
        points = []
        for number in range(scale.budgets):
            budget_bytes = lowest_bytes + (highest_bytes - lowest_bytes) * number // (scale.budgets - 1)
            points.append(arena.fxckpt(budget_bytes))
            bar.update()
        rivals = []
        for peer in all_peers:
            rivals.append(arena.rival(peer))
            bar.update()
    step_us = arena.plain_step_us()
    return Result(subject.name, arena.plain, step_us, arena.baseline, lowest_bytes, tuple(points), tuple(rivals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of models; all by default")
    parser.add_argument("--quick", action="store_true", help="small models, fewer peers, nothing timed")
    parser.add_argument("--runs", type=int, help="how often each step is timed; by default 15, or 0 if quick")
    parser.add_argument("--output", type=Path, help="folder for the results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    scale = QUICK if options.quick else FULL
    scale = scale if options.runs is None else replace(scale, runs=options.runs)
    faults = []
    for subject in subjects(options.models or list(QUICK_MODELS if options.quick else ())):
        result = compete(subject, scale, subject.quick if options.quick else subject.full)
        print(f"\n## {subject.name}\n\n{table(result)}", flush=True)
        faults += result.faults()
        if options.output is not None:
            write(options.output, result, runs=scale.runs)
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
