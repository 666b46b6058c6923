"""Training where eager can't, under a hard limit of the process; and how long planning takes."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import torch
from torch import nn

import fxckpt
from benchmarks.gpu.bench import Autocast, Bench, Built
from benchmarks.gpu.subjects import TRAINED
from benchmarks.models.cases import Case
from benchmarks.models.training import clear_gradients

STEPS = 4
RATE = 1e-3
SHARES = (1.0, 0.95, 0.9)
"""The budgets that are tried, over the limit: what the process holds beside the step is not the plan's."""


def limit(bench: Bench, *, subject: str, fraction: float) -> dict[str, Any]:
    """Train in eager and planned while the process may not have more than a fraction of eager's peak.

    Returns:
        `eager` and, for each budget tried, `attempts`: "trained" or the error; peaks of the one that trained [B].
    """
    trained = TRAINED[subject]
    case = trained.subject.quick if bench.tiny else trained.subject.full
    built = bench.build(case)
    step = bench.step(built, case, autocast=trained.autocast)
    step.warm_up()
    plain_bytes = step.resident_bytes() + step.allocated_bytes()
    limit_bytes = int(fraction * plain_bytes)
    del step
    _limit(bench, limit_bytes)
    found: dict[str, Any] = {"plain_bytes": plain_bytes, "limit_bytes": limit_bytes, "attempts": []}
    found["eager"], _ = _train(bench, built, case, built[0], autocast=trained.autocast)
    for share in SHARES:
        _free(bench, built)
        start = time.perf_counter()
        try:
            optimized = bench.optimized(built, int(share * limit_bytes), autocast=trained.autocast)
        except Exception as error:
            found["attempts"].append([share, f"{type(error).__name__} while it was planned: {error}"[:300]])
            continue
        planning_s = time.perf_counter() - start
        outcome, losses = _train(bench, built, case, optimized, autocast=trained.autocast)
        found["attempts"].append([share, outcome])
        if outcome == "trained":
            plan = fxckpt.graphs(optimized).plan
            found |= {"budget_bytes": plan.budget_bytes, "planning_s": planning_s, "losses": losses}
            found |= _peaks(bench)
            break
    return found


def planning(bench: Bench, *, subject: str, budget: float, cache: str) -> dict[str, Any]:
    """How long the first `optimize` of a model takes, with no measured cost in the cache or with all of them.

    Args:
        bench: where it runs; its folder keeps the cache of a subject for the second process.
        subject: a name of `TRAINED`.
        budget: a fraction of the plain peak.
        cache: "cold", or "warm" after a process that was cold.
    """
    assert bench.folder is not None
    folder = bench.folder / f"planning_{subject}"
    folder.mkdir(exist_ok=cache == "warm")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    trained = TRAINED[subject]
    built = bench.build(trained.subject.quick if bench.tiny else trained.subject.full)
    bench.synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    optimized = bench.optimized(
        built, budget, autocast=trained.autocast, cost_model="measure", cost_cache=folder / "costs.json"
    )
    bench.synchronize()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    plan = fxckpt.graphs(optimized).plan
    return {
        "planning_s": seconds,
        "cpu_s": cpu_s,
        "ops": len(plan.graph.ops),
        "predicted_bytes": plan.predicted.peak_bytes,
    }


def _limit(bench: Bench, limit_bytes: int) -> None:
    if bench.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes)


def _free(bench: Bench, built: Built) -> None:
    clear_gradients(built[0])
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _train(bench: Bench, built: Built, case: Case, model: nn.Module, *, autocast: bool) -> tuple[str, list[float]]:
    """Some steps of plain gradient descent; how it ended, and the losses."""
    original, args, kwargs = built
    running = Autocast(model, bench.device, enabled=autocast)
    losses: list[float] = []
    try:
        for _ in range(STEPS):
            clear_gradients(original)
            loss = case.loss(running(*args, **kwargs))
            loss.backward()
            losses.append(float(loss.detach()))
            with torch.no_grad():
                for parameter in original.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=RATE)
        bench.synchronize()
    except torch.OutOfMemoryError as error:
        return f"OutOfMemoryError: {str(error).splitlines()[0][:200]}", losses
    return "trained", losses


def _peaks(bench: Bench) -> dict[str, int]:
    if bench.device != "cuda":
        return {}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }
