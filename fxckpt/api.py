"""What a user calls: plan a model, optimize it, print what was decided, measure what it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO, TypeVar, Unpack, cast

import torch
from torch import fx, nn

from fxckpt.calls import read_call
from fxckpt.capture.watch import watch
from fxckpt.core.advice import Advice
from fxckpt.core.batch import MaxBatch, largest_batch
from fxckpt.core.graph import Graph
from fxckpt.core.pareto import Pareto
from fxckpt.core.plans import Plan
from fxckpt.core.report.table import plan_text
from fxckpt.errors import BudgetError, CaptureError, FxckptError
from fxckpt.module.function import FunctionModule, PlannedFunction
from fxckpt.module.profiled import profile_call
from fxckpt.module.stand_in import plain_model, planner_of, stand_in
from fxckpt.options import Budget, OptimizeOptions, Options, PlanOptions, read_options
from fxckpt.pipeline import Compiled, free_bytes, make_plan
from fxckpt.profile.build import Profile
from fxckpt.profile.optimizer_state import optimizer_state_bytes
from fxckpt.steps.comparison import Comparison, compare
from fxckpt.steps.step import Measurement, TrainingStep, measure_step
from fxckpt.units import within

Planned = TypeVar("Planned", bound=Callable[..., Any])
"""A module, or a function that calls some."""


def optimize(
    model: Planned,
    memory_budget: Budget = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    verify: bool = False,
    methods: Sequence[str] = (),
    graph_breaks: bool = False,
    max_plans: int = 64,
    **options: Unpack[OptimizeOptions],
) -> Planned:
    """The same model, training within a memory budget with the same gradients.

    Args:
        model: any module, or a function that calls modules, such as one that computes a step's loss: then all that it
            computes is planned together, whichever models and however many forwards that takes. It is left as it is;
            the result shares parameters, buffers and submodules with it.
        memory_budget: bound on the peak of a training step, everything counted (parameters, gradients, activations,
            what kernels need inside): a size such as "8GB" or "500MiB", bytes as an int, or a fraction in (0, 1] of the
            plain model's peak. None: what the model's CUDA device has free.
        example_inputs, example_kwargs: arguments of a call, to capture and plan now; else that happens at the first
            call.
        plan: a plan to apply instead of solving; an `OverBudgetWarning` says so where its peak is over the budget here.
        verify: run each planned step and the plain one once, on copies of the model, and compare what they leave bit by
            bit. Takes the memory of the plain step.
        methods: names of methods to plan beside forward, such as ("encode_image",). Each call of one is a step.
        graph_breaks: where TorchDynamo can't make one graph of forward, plan each of several. By default that is an
            error, since each of them is planned as if the others took no memory.
        max_plans: how many plans to keep; beyond, the one that was used least recently is forgotten.
        **options: how to plan: `solver`, `effort`, `solver_options`, `cost_model`, `cost_cache`, `device`, `optimizer`,
            `reserve`; see `Options`.

    Returns:
        A module that stands in for the model everywhere: `isinstance`, `state_dict`, attributes and methods are the
        model's. It plans once for each form of input. Without grad it runs the plain forward. For a function: a
        function.

    Raises:
        BudgetError: the budget or reserve makes no sense.
        CaptureError: the model can't be captured as one graph.
        InfeasibleBudgetError: the budget is below what recomputation can reach.
        PlanMismatchError: `plan` is for another graph.
        SolverError: there is no such solver, or it does not have the options given.
        VerificationError: with `verify`, a step leaves something else than the plain step. The message names the first
            op that differs: put it into a bug report.
    """
    if plan is not None and memory_budget is None:
        memory_budget = plan.budget_bytes
    read = read_options(memory_budget, options, plan=plan, verify=verify)
    read = replace(read, methods=_methods(model, methods), graph_breaks=graph_breaks, max_plans=max_plans)
    module = _module(model)
    result = stand_in(module, read)
    planner = planner_of(result)
    assert planner is not None
    if example_inputs is not None or example_kwargs is not None:
        planner.prepare(_arguments(example_inputs), dict(example_kwargs or {}))
    elif memory_budget is None:
        free_bytes(next((p.device for p in module.parameters()), torch.device("cpu")))  # to fail now rather than later
    return cast(Planned, result if isinstance(model, nn.Module) else PlannedFunction(plain(model), result))


def plain(model: Planned) -> Planned:
    """The user's own model behind one that `optimize` returned, with the same parameters: for steps without a plan.

    Those are steps that plans don't serve, such as gradients of gradients. Other modules are returned as they are.
    """
    if not isinstance(model, PlannedFunction):
        return cast(Planned, plain_model(model) if isinstance(model, nn.Module) else model)
    behind = plain_model(model.module)
    assert isinstance(behind, FunctionModule)
    return cast(Planned, behind.function)


def plan(
    model: nn.Module | Callable[..., Any],
    memory_budget: Budget = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Plan a training step without running or allocating anything; the model may be on the meta device.

    Arguments are those of `optimize`, and `gradients`, which says whether `.grad` is None before the step ("fresh"),
    holds tensors ("allocated"), or is as the model has it now ("auto"). What kernels allocate inside is known only if
    ops may be run: with cost_model="measure", or by `optimize`.

    Raises:
        BudgetError, CaptureError, InfeasibleBudgetError, SolverError: as `optimize`.
    """
    request = read_options(memory_budget, options, only_plans=True)
    return make_plan(_profile(model, example_inputs, example_kwargs, request), request)


def pareto(
    model: nn.Module | Callable[..., Any],
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[PlanOptions],
) -> Pareto:
    """The whole curve of a training step, peak against time: from the lowest peak that is found to the plain step.

    Arguments are those of `plan`, without a budget. Print the result, ask it for the plan `at` a budget, for the
    `knee`, or for a picture.

    Raises:
        BudgetError, CaptureError, SolverError: as `optimize`.
    """
    request = read_options(1.0, options, only_plans=True)
    graph = _profile(model, example_inputs, example_kwargs, request).graph
    return Pareto.of(graph, request.solver, cost_model=request.cost_model, **request.solver_arguments)


def advise(
    model: nn.Module | Callable[..., Any],
    memory_budget: str | int | float | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[PlanOptions],
) -> Advice:
    """Is checkpointing worth it here? What fills the memory, what saving it costs in time, and what else would help.

    Arguments are those of `plan`, but without a budget the advice is about the whole curve. Print the result, or read
    its fields.

    Raises:
        BudgetError, CaptureError, SolverError: as `optimize`.
    """
    found = pareto(model, example_inputs=example_inputs, example_kwargs=example_kwargs, **options)
    optimizer = options.get("optimizer")
    parameters = _module(model).parameters()
    optimizer_bytes = 0 if optimizer is None else optimizer_state_bytes(optimizer, parameters)
    return Advice(found, optimizer_bytes, None if memory_budget is None else found.budget_bytes(memory_budget))


def max_batch(
    model_fn: Callable[[int], tuple[nn.Module, Any]],
    memory_budget: str | int,
    *,
    max_overhead: float | None = None,
    least: int = 1,
    most: int = 2**20,
    progress: bool = True,
    **options: Unpack[PlanOptions],
) -> MaxBatch:
    """The largest batch whose training step fits a memory budget when it is planned, and its plan. Nothing runs.

    Args:
        model_fn: takes a batch size and returns (model, inputs): a tuple of arguments, a dict of keyword arguments, or
            a pair of both. On the meta device it takes no memory: wrap its body in `with torch.device("meta")`.
        memory_budget: a size such as "8GB", or bytes.
        max_overhead: the most time that recomputing may add to the plain step of the same batch: 0.2 means 20 %. By
            default the batch is the largest at any price, which can be high.
        least, most: bounds on the batch size.
        progress: whether to show on stderr how far it is.
        **options: as for `plan`.

    Raises:
        BudgetError, CaptureError, SolverError: as `optimize`.
        InfeasibleBudgetError: not even the least batch fits.
    """
    if max_overhead is not None and not (isinstance(max_overhead, (int, float)) and max_overhead >= 0):
        raise BudgetError(
            f"max_overhead is a fraction of the plain step's time, such as 0.2 for 20 %, not {max_overhead!r}"
        )
    if isinstance(memory_budget, float) or not 0 < least <= most:
        raise BudgetError(
            'the largest batch is sought for a size such as "8GB" or a number of bytes, from `least` (1 or more) to '
            f"`most`, not for {memory_budget!r} from {least!r} to {most!r}"
        )
    request = read_options(memory_budget, options, only_plans=True)

    def graph_of(batch_size: int) -> Graph:
        call = read_call(model_fn(batch_size), f"model_fn({batch_size})")
        return _profile(call.model, call.args, call.kwargs, request).graph

    return largest_batch(
        graph_of,
        within(memory_budget, 0),
        request.solver,
        request.solver_arguments,
        least=least,
        most=most,
        cost_model=request.cost_model,
        max_overhead=max_overhead,
        progress=progress,
    )


def print_plan(
    model_or_plan: nn.Module | Callable[..., Any] | Plan,
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


def plan_of(model_or_plan: nn.Module | Callable[..., Any] | Plan) -> Plan:
    """The latest plan of an optimized module; a plan is returned as it is.

    Raises:
        FxckptError: the module is not an optimized one, or nothing is planned yet.
    """
    if isinstance(model_or_plan, Plan):
        return model_or_plan
    return _compiled(model_or_plan).plan


@dataclass(frozen=True)
class Graphs:
    """A plan and the fx graphs of the planned step; print their `code` to read them.

    Attributes:
        captured: forward and backward of the plain model in one graph. Each op's `node.meta["fxckpt"]` says how often
            it runs and what is decided for what it writes.
        forward: what runs in forward. Takes its inputs in one list, which it empties.
        backward: what runs in backward. Repeated ops have names that end in `_again`; each `yield` hands over
            gradients.
        plan: the plan that they execute.
    """

    captured: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    plan: Plan


def graphs(model: nn.Module | Callable[..., Any]) -> Graphs:
    """The latest plan of an optimized module and the graphs that execute it.

    Raises:
        FxckptError: the module is not an optimized one, or nothing is planned yet.
    """
    compiled = _compiled(model)
    return Graphs(compiled.profile.joint.module, *compiled.program.executable.modules, compiled.plan)


def _compiled(model: nn.Module | Callable[..., Any]) -> Compiled:
    planner = planner_of(_module(model))
    if planner is None:
        raise FxckptError("this module has no plan: give the module that fxckpt.optimize returned")
    if planner.latest is None:
        raise FxckptError("nothing is planned yet: call the module once, or give example_inputs to fxckpt.optimize")
    return planner.latest


def measure(model: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Measurement:
    """Run training steps and measure their real peak and time, for plain and optimized modules alike.

    Backward starts from the model's `loss` if it returns one, else from ones for every output that requires grad.
    Gradients, buffers and random-number state are afterwards what they were.
    """
    return measure_step(_module(model), args, kwargs)


def benchmark(
    model: nn.Module | Callable[..., Any],
    optimized: nn.Module | Callable[..., Any],
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    runs: int = 15,
) -> Comparison:
    """Run a plain model and an optimized one against each other: peaks, times, FLOPs, gradients.

    Both take training steps in turn, each from the same state of random numbers; where backward starts is as for
    `measure`. The models are left as they were. Print the result, or ask it for JSON.

    Args:
        model: the plain model.
        optimized: what `optimize` returned for it, or any other module with the same parameters.
        example_inputs, example_kwargs: arguments of a call.
        runs: how many steps of each to time.

    Raises:
        FxckptError: a model can't be run, the two have different parameters, or there are fewer than two runs.
    """
    args, kwargs = _arguments(example_inputs), dict(example_kwargs or {})
    plain_step = TrainingStep(plain_model(_module(model)), args, kwargs)
    return compare(plain_step, TrainingStep(_module(optimized), args, kwargs), runs=runs)


def _profile(
    model: nn.Module | Callable[..., Any],
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    options: Options,
) -> Profile:
    """Capture the plain model's step."""
    plain = plain_model(_module(model))
    allocated = options.gradients == "allocated"
    if options.gradients == "auto":
        allocated = watch(plain).gradients_allocated()
    try:
        with torch.enable_grad():
            return profile_call(
                plain, _arguments(example_inputs), dict(example_kwargs or {}), options, gradients_allocated=allocated
            )
    except CaptureError as error:
        if example_inputs is None and example_kwargs is None:
            raise CaptureError(f"{error}. It was called without arguments: give example_inputs=(x,)") from error
        raise


def _methods(model: object, names: Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if not callable(getattr(model, name, None)):
            raise FxckptError(f"the model has no method {name!r} to plan")
    return names


def _module(model: object) -> nn.Module:
    """The module that is planned for what a user gives: itself, or one around a function."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, PlannedFunction):
        return model.module
    if not callable(model) or isinstance(model, type):
        raise FxckptError(
            f"the model must be a torch.nn.Module, or a function that calls some, not {type(model).__name__}"
        )
    return FunctionModule(model)


def _arguments(example_inputs: Sequence[Any] | None) -> tuple[Any, ...]:
    if isinstance(example_inputs, torch.Tensor):
        raise FxckptError("example_inputs is a tuple of the model's arguments: write (x,) instead of x")
    return tuple(example_inputs or ())
