"""Steps against eager's, in turn: a model under a way to save memory, and the time to launch a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

import fxckpt
from benchmarks.gpu.bench import Bench, Built
from benchmarks.gpu.subjects import TRAINED, Trained
from benchmarks.models.cases import Case
from benchmarks.models.cases import case as case_named
from benchmarks.peers.eager import Forward, fused, peers
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.steps.comparison import Ratio, gradients_of, largest_difference
from fxckpt.steps.step import TrainingStep, timed_in_turn

FLOOR = "floor"
NO_LIMIT = 2**62


def frontier(
    bench: Bench, *, subject: str, way: str, budget: float | str | None = None, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Peak and time of a model's step under a way to save memory, beside eager's in the same process.

    Args:
        bench: where it runs.
        subject: a name of `TRAINED`.
        way: "eager", "checkpoint", "selective", "compile", "compiled checkpoint" or "fxckpt".
        budget: of "compile", its `activation_memory_budget`; of "fxckpt", a fraction of eager's measured peak, or
            "floor".
        options: further ones of `fxckpt.optimize`.

    Returns:
        Peaks [B], times [µs], `time`, the ratio to eager's with quartiles, samples a second, how far gradients are
        from eager's. Only `floor_bytes` if the budget is below the floor.
    """
    trained, case = _named(bench, subject)
    plain = bench.step(bench.build(case), case, autocast=trained.autocast)
    plain.warm_up()
    plain_bytes = plain.resident_bytes() + plain.allocated_bytes()
    gradients = gradients_of(plain)

    planned: dict[str, Any] = {}
    before_bytes = bench.held_bytes()
    built, start = bench.build(case), time.perf_counter()
    if way == "fxckpt":
        try:
            step, planned = _planned(bench, trained, built, plain_bytes, budget, options or {})
        except InfeasibleBudgetError as error:
            return {"plain_bytes": plain_bytes, "floor_bytes": error.floor_bytes}
    else:
        step = bench.step(built, case, autocast=trained.autocast, apply=_way(trained, way, budget))
    step.warm_up()
    bench.synchronize()
    first_call_s = time.perf_counter() - start

    peak_bytes = bench.peak_bytes(step, before_bytes)
    difference = largest_difference(gradients_of(step), gradients)
    del gradients
    plain_us, ours_us = timed_in_turn([plain, step], 3 if bench.tiny else 10)
    step_us = statistics.median(ours_us)
    return {
        "plain_bytes": plain_bytes,
        "peak_bytes": peak_bytes,
        "plain_us": statistics.median(plain_us),
        "step_us": step_us,
        "time": asdict(Ratio.of(ours_us, plain_us)),
        "samples_per_s": _samples(trained, built) / step_us * 1e6,
        "gradient_difference": difference,
        "first_call_s": first_call_s,
        **planned,
    }


def prepare(bench: Bench, *, subject: str, way: str, budget: float | None = None) -> dict[str, Any]:
    """Compile what `frontier` will run, so that it finds it in Inductor's cache."""
    trained, case = _named(bench, subject)
    start = time.perf_counter()
    step = bench.step(bench.build(case), case, autocast=trained.autocast, apply=_way(trained, way, budget))
    step.run()
    bench.synchronize()
    return {"first_call_s": time.perf_counter() - start}


def host(bench: Bench, *, model: str, budget: float | None = None) -> dict[str, Any]:
    """Time until a step's last kernel is launched: planned against eager, in turn, while the device was idle before.

    Args:
        bench: where it runs.
        model: a name of `TRAINED`, or of a case.
        budget: a fraction of the plain peak; None: there is no limit, so nothing is repeated.
    """
    trained, case = _named(bench, model) if model in TRAINED else (None, case_named(model))
    autocast = trained is not None and trained.autocast
    plain = bench.step(bench.build(case), case, autocast=autocast)
    built = bench.build(case)
    optimized = bench.optimized(built, NO_LIMIT if budget is None else budget, autocast=autocast)
    ours = bench.step(built, case, autocast=autocast, apply=lambda _: optimized)
    for step in (plain, ours):
        step.warm_up()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(4 if bench.tiny else 20):
        for index in (number % 2, 1 - number % 2):
            times[index].append(_launch_us(bench, (plain, ours)[index]))
    return {
        "plain_us": statistics.median(times[0]),
        "launch_us": statistics.median(times[1]),
        "time": asdict(Ratio.of(times[1], times[0])),
        "repeats": sum(fxckpt.graphs(optimized).plan.schedule.repeats().values()),
    }


def _launch_us(bench: Bench, step: TrainingStep) -> float:
    with step.without_trace():
        bench.synchronize()
        start = time.perf_counter()
        step.run()
        return (time.perf_counter() - start) * 1e6


def _named(bench: Bench, name: str) -> tuple[Trained, Case]:
    trained = TRAINED[name]
    return trained, trained.subject.quick if bench.tiny else trained.subject.full


def _planned(
    bench: Bench, trained: Trained, built: Built, plain_bytes: int, budget: float | str | None, options: dict[str, Any]
) -> tuple[TrainingStep, dict[str, Any]]:
    start = time.perf_counter()
    if budget == FLOOR:
        try:
            bench.optimized(built, 1, autocast=trained.autocast, **options)
            raise AssertionError("a model was planned in one byte")
        except InfeasibleBudgetError as error:
            budget_bytes = error.floor_bytes
        start = time.perf_counter()
    else:
        assert isinstance(budget, float)
        budget_bytes = int(budget * plain_bytes)
    optimized = bench.optimized(built, budget_bytes, autocast=trained.autocast, **options)
    plan = fxckpt.graphs(optimized).plan
    planned = {
        "planning_s": time.perf_counter() - start,
        "budget_bytes": budget_bytes,
        "predicted_bytes": plan.predicted.peak_bytes,
        "predicted_time": plan.predicted.step_us / plan.baseline.step_us,
        "repeats": sum(plan.schedule.repeats().values()),
    }
    case = trained.subject.quick if bench.tiny else trained.subject.full
    return bench.step(built, case, autocast=trained.autocast, apply=lambda _: optimized), planned


def _way(trained: Trained, way: str, budget: float | str | None) -> Callable[[nn.Module], Forward]:
    def apply(model: nn.Module) -> Forward:
        found = {peer.name: peer for peer in peers(model, list(trained.subject.paths(model)), True, ())}
        if way == "compile":
            assert isinstance(budget, float)
            return fused(model, budget)
        forward: Forward = model
        if way in ("checkpoint", "compiled checkpoint"):
            forward = found["checkpoint every 1"].apply(model)
        if way == "selective":
            forward = found["selective"].apply(model)
        return fused(forward, 1.0) if way == "compiled checkpoint" else forward

    return apply


def _samples(trained: Trained, built: Built) -> int:
    """How many tokens or images a step has."""
    _, args, kwargs = built
    first = (*args, *kwargs.values())[0]
    count = first.numel() if trained.samples == "tokens" else first.shape[0]
    return int(count)
