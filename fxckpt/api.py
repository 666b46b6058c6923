"""What a user calls: plan a model, optimize it, print what was decided, measure what it takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO, TypeVar, cast

import torch
from torch import fx, nn

from fxckpt.compile import COST_MODELS, Budget, Compiled, Options, free_bytes, make_plan, profile_step
from fxckpt.errors import BudgetError, FxckptError, SolverError
from fxckpt.measurement import Measurement, measure_step
from fxckpt.optimized import plain_model, planner_of, stand_in
from fxckpt.plans import Plan
from fxckpt.profile.estimate import DeviceProfile
from fxckpt.profile.optimizer_state import optimizer_state_bytes
from fxckpt.report.table import plan_text
from fxckpt.signature import watch
from fxckpt.solvers import SOLVERS, Solver
from fxckpt.units import parse_bytes

Model = TypeVar("Model", bound=nn.Module)
Gradients = Literal["auto", "fresh", "allocated"]


def optimize(
    model: Model,
    memory_budget: Budget = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    solver: str | Solver = "auto",
    cost_model: str = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    reserve: int | str = 0,
    plan: Plan | None = None,
    verify: bool = False,
) -> Model:
    """The same model, training within a memory budget with the same gradients.

    Args:
        model: any module. It is left as it is; the result shares its parameters, buffers and submodules.
        memory_budget: bound on the peak of a training step, everything counted (parameters, gradients, activations,
            what kernels need inside): a size such as "8GB" or "500MiB", bytes as an int, or a fraction in (0, 1] of the
            plain model's peak. None: what the model's CUDA device has free.
        example_inputs, example_kwargs: arguments of a call, to capture and plan now; else that happens at the first
            call.
        solver: name of a solver (see `fxckpt.solvers.SOLVERS`), or a function from a graph and a budget in bytes to a
            schedule.
        cost_model: "measure" times the ops on the device, "estimate" computes from FLOPs and bytes, "reference" is a
            fixed device; "auto" measures where the model is on a real device.
        optimizer: its state counts towards the peak.
        reserve: bytes to leave for other things.
        plan: a plan to apply instead of solving.
        verify: run each planned step and the plain one once, on copies of the model, and compare what they leave bit by
            bit. Takes the memory of the plain step.

    Returns:
        A module that stands in for the model everywhere: `isinstance`, `state_dict`, attributes and methods are the
        model's. It plans once for each form of input. Without grad it runs the plain forward.

    Raises:
        BudgetError: the budget or reserve makes no sense.
        CaptureError: the model can't be captured as one graph.
        InfeasibleBudgetError: the budget is below what recomputation can reach.
        PlanMismatchError: `plan` is for another graph.
        VerificationError: with `verify`, a step leaves something else than the plain step. The message names the first
            op that differs: put it into a bug report.
    """
    if plan is not None and memory_budget is None:
        memory_budget = plan.budget_bytes
    options = _options(memory_budget, solver, cost_model, optimizer, reserve, plan=plan, verify=verify)
    result = stand_in(model, options)
    planner = planner_of(result)
    assert planner is not None
    if example_inputs is not None or example_kwargs is not None:
        planner.prepare(_arguments(example_inputs), dict(example_kwargs or {}))
    elif memory_budget is None:
        free_bytes(next((p.device for p in model.parameters()), torch.device("cpu")))  # to fail now rather than later
    return cast(Model, result)


def plan(
    model: nn.Module,
    memory_budget: Budget = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    solver: str | Solver = "auto",
    cost_model: str = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    reserve: int | str = 0,
    gradients: Gradients = "auto",
    device: str | DeviceProfile | None = None,
) -> Plan:
    """Plan a training step without running or allocating anything; the model may be on the meta device.

    Arguments are those of `optimize`; `gradients` says whether `.grad` is None before the step ("fresh"), holds tensors
    ("allocated"), or is as the model has it now ("auto"); `device` names what to estimate times for ("A100", "H100",
    "RTX 4090", "cpu", or a `DeviceProfile`), by default where the model is, or an A100 for the meta device. What
    kernels allocate inside is known only if ops may be run: with cost_model="measure", or by `optimize`.

    Raises:
        BudgetError, CaptureError, InfeasibleBudgetError: as `optimize`.
    """
    options = _options(
        memory_budget, solver, cost_model, optimizer, reserve, run_ops=cost_model == "measure", device=device
    )
    plain = plain_model(model)
    if gradients not in ("auto", "fresh", "allocated"):
        raise BudgetError(f'gradients must be "auto", "fresh" or "allocated", not {gradients!r}')
    allocated = watch(plain).gradients_allocated() if gradients == "auto" else gradients == "allocated"
    with torch.enable_grad():
        profile = profile_step(
            plain,
            _arguments(example_inputs),
            dict(example_kwargs or {}),
            options,
            forward=plain.forward,
            gradients_allocated=allocated,
        )
    return make_plan(profile, options)


def print_plan(
    model_or_plan: nn.Module | Plan,
    *,
    all: bool = False,  # noqa: A002 (the name that people look for)
    file: TextIO | None = None,
    measurement: Measurement | None = None,
) -> None:
    """Print what was decided and why: the latest plan of an optimized module, or a plan.

    Args:
        model_or_plan: an optimized module or a plan.
        all: every row, instead of the largest.
        file: where to print; standard output by default.
        measurement: real figures (see `measure`) to print beside the predicted ones.

    Raises:
        FxckptError: the module is not an optimized one, or nothing is planned yet.
    """
    print(plan_text(plan_of(model_or_plan), all=all, measurement=measurement), file=file or sys.stdout, end="")


def plan_of(model_or_plan: nn.Module | Plan) -> Plan:
    """The latest plan of an optimized module; a plan is returned as it is.

    Raises:
        FxckptError: the module is not an optimized one, or nothing is planned yet.
    """
    if isinstance(model_or_plan, Plan):
        return model_or_plan
    return _compiled(model_or_plan).plan


@dataclass(frozen=True)
class Graphs:
    """The fx graphs of a planned step; print their `code` to read them.

    Attributes:
        captured: forward and backward of the plain model in one graph. Each op's `node.meta["fxckpt"]` says how often
            it runs and what is decided for what it writes.
        forward: what runs in forward. Takes its inputs in one list, which it empties.
        backward: what runs in backward. Repeated ops have names that end in `_again`; each `yield` hands over
            gradients.
    """

    captured: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule


def graphs(model: nn.Module) -> Graphs:
    """The graphs behind the latest plan of an optimized module.

    Raises:
        FxckptError: the module is not an optimized one, or nothing is planned yet.
    """
    compiled = _compiled(model)
    emitted = compiled.program.emitted
    return Graphs(compiled.profile.joint.module, emitted.forward, emitted.backward)


def _compiled(model: nn.Module) -> Compiled:
    planner = planner_of(model)
    if planner is None:
        raise FxckptError("this module has no plan: give the module that fxckpt.optimize returned")
    if planner.latest is None:
        raise FxckptError("nothing is planned yet: call the module once, or give example_inputs to fxckpt.optimize")
    return planner.latest


def measure(model: nn.Module, *args: Any, **kwargs: Any) -> Measurement:
    """Run training steps and measure their real peak and time, for plain and optimized modules alike.

    Backward starts from the model's `loss` if it returns one, else from ones for every output that requires grad.
    Gradients, buffers and random-number state are afterwards what they were.
    """
    return measure_step(model, args, kwargs)


def _options(
    budget: Budget,
    solver: str | Solver,
    cost_model: str,
    optimizer: torch.optim.Optimizer | None,
    reserve: int | str,
    **rest: Any,
) -> Options:
    if cost_model not in COST_MODELS:
        raise BudgetError(f"there is no cost model {cost_model!r}; choose one of {', '.join(COST_MODELS)}")
    if isinstance(solver, str) and solver not in SOLVERS:
        raise SolverError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    reserve_bytes = parse_bytes(reserve) if isinstance(reserve, str) else reserve
    if isinstance(reserve_bytes, bool) or not isinstance(reserve_bytes, int) or reserve_bytes < 0:
        raise BudgetError(f"reserve must be a number of bytes, zero or more, not {reserve!r}")
    if optimizer is not None:
        reserve_bytes += optimizer_state_bytes(optimizer)
    if isinstance(budget, str):
        parse_bytes(budget)
    return Options(budget, solver, cost_model, reserve_bytes, **rest)


def _arguments(example_inputs: Sequence[Any] | None) -> tuple[Any, ...]:
    if isinstance(example_inputs, torch.Tensor):
        raise FxckptError("example_inputs is a tuple of the model's arguments: write (x,) instead of x")
    return tuple(example_inputs or ())
