"""One step, planned and plain: the same bits wherever eager agrees with itself, the same random state, and the peak."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch
from torch import Tensor

import fxckpt
from benchmarks.gpu.bench import Autocast, Bench
from benchmarks.models.cases import case as case_named
from benchmarks.models.training import Step, assert_same_bits, clear_gradients, run_step
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.steps.step import TrainingStep

EAGER_RUNS = 3
"""How often eager runs to find out where it agrees with itself."""


def correctness(bench: Bench, *, case: str, types: str, budget: float, deterministic: bool) -> dict[str, Any]:
    """Compare steps of a case.

    Args:
        bench: where it runs.
        case: name of a case.
        types: "float32", or "bf16" for autocast.
        budget: fraction of the plain peak; the floor where that is higher.
        deterministic: whether torch is told to use deterministic kernels, where there are some.

    Returns:
        `differing`, the names of what has other bits than eager's, of which `eager_differing` are those in which
        eager differs from itself; peaks and budget [B]; `planning_s`.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    chosen = case_named(case)
    model, args, kwargs = bench.build(chosen)
    plain = Autocast(copy.deepcopy(model), bench.device, enabled=types == "bf16")
    is_strict = deterministic and _deterministic(plain, args, kwargs, chosen.loss)

    start = time.perf_counter()
    floor_bytes = None
    try:
        optimized = bench.optimized((model, args, kwargs), budget, autocast=plain.enabled)
    except InfeasibleBudgetError as error:
        floor_bytes = error.floor_bytes
        optimized = bench.optimized((model, args, kwargs), floor_bytes, autocast=plain.enabled)
    planning_s = time.perf_counter() - start
    plan = fxckpt.graphs(optimized).plan
    planned = Autocast(optimized, bench.device, enabled=plain.enabled)

    eager = [_left(run_step(copy.deepcopy(plain), args, kwargs, chosen.loss)) for _ in range(EAGER_RUNS)]
    ours = _left(run_step(planned, args, kwargs, chosen.loss))
    unsteady = sorted({name for other in eager[1:] for name in _differing(other, eager[0])})
    clear_gradients(planned)
    step = TrainingStep(planned, args, kwargs)
    step.warm_up()
    return {
        "deterministic": is_strict,
        "compared": len(ours),
        "eager_differing": unsteady,
        "differing": [name for name in _differing(ours, eager[0]) if name not in unsteady],
        "planning_s": planning_s,
        "floor_bytes": floor_bytes,
        "plain_bytes": plan.baseline.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "predicted_bytes": plan.predicted.peak_bytes,
        "peak_bytes": step.resident_bytes() + step.allocated_bytes(),
        "repeats": sum(plan.schedule.repeats().values()),
    }


def _deterministic(plain: Autocast, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> bool:
    """Tell torch to use deterministic kernels; whether the plain step has them all. If not, it is told otherwise."""
    torch.use_deterministic_algorithms(True)
    try:
        run_step(copy.deepcopy(plain), args, kwargs, loss)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(False)
        return False
    return True


def _left(step: Step) -> dict[str, Tensor | None]:
    """All that a step leaves, by name; the random state is that of all devices."""
    found: dict[str, Tensor | None] = {"loss": step.loss, "random state": step.random_state}
    found |= {f"gradient of {name}": gradient for name, gradient in step.gradients.items()}
    found |= {f"gradient of input {n}": gradient for n, gradient in enumerate(step.input_gradients)}
    found |= {f"buffer {name}": buffer for name, buffer in step.buffers.items()}
    return found


def _differing(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> list[str]:
    return [name for name in sorted({*found, *expected}) if not _same(found.get(name), expected.get(name))]


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    try:
        assert_same_bits(found, expected, "")
    except AssertionError:
        return False
    return True
