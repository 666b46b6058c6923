"""What a user asks for: a budget, a solver, where times come from. Read, checked, and turned into bytes here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from fxckpt.core.plans import Plan
from fxckpt.core.solvers import Solver, check_options
from fxckpt.core.solvers.chain.dp import Effort
from fxckpt.errors import BudgetError
from fxckpt.profile.estimate import DeviceProfile
from fxckpt.profile.optimizer_state import optimizer_state_bytes
from fxckpt.units import parse_bytes, within

COST_MODELS = ("auto", "estimate", "measure", "reference")

Budget = str | int | float | None
"""A size such as "8GB", bytes, a fraction of the plain model's peak, or None for what the CUDA device has free."""


class PlanOptions(TypedDict, total=False):
    """How to plan: keyword arguments of `optimize`, `plan` and all that plans.

    Attributes:
        solver: name of a solver (see `fxckpt.core.solvers.SOLVERS`), or a function from a graph and a budget in bytes
            to a schedule. By default "auto".
        effort: how long to search, "fast", "default" or "max": milliseconds, seconds, or up to a minute for some
            hundred ops. For solvers that search: auto, dp, min_memory.
        solver_options: further arguments of the solver, such as {"k": 3} for "uniform".
        cost_model: "measure" times the ops on the device, "estimate" computes from FLOPs and bytes, "reference" is a
            fixed device; "auto", the default, measures where ops may be run: in `optimize`, on a real device.
        cost_cache: a JSON file in which measured costs are kept from one process to the next. Made if it is not there.
        device: what to estimate times for ("A100", "H100", "RTX 4090", "cpu", or a `DeviceProfile`); by default where
            the model is, or an A100 for the meta device.
        optimizer: its state counts towards the peak.
        reserve: bytes to leave for other things, as a number or a size such as "1GB".
    """

    solver: str | Solver
    effort: Effort | None
    solver_options: Mapping[str, Any]
    cost_model: str
    cost_cache: str | os.PathLike[str] | None
    device: str | DeviceProfile | None
    optimizer: torch.optim.Optimizer | None
    reserve: int | str


@dataclass(frozen=True)
class Options:
    """The same, checked; what is not given has its default.

    Attributes:
        budget: bound on the peak.
        solver: name of a solver, or a function from graph and budget to a schedule.
        solver_options: further arguments of the solver, `effort` among them.
        cost_model: name of a cost model.
        cost_cache: file of measured costs.
        device: what to estimate times for, if not the device that the model is on.
        reserve_bytes: memory to leave for other things, optimizer state among them [B].
        run_ops: whether ops may be run to find their workspace and time.
        plan: a plan to apply instead of solving.
        verify: whether to compare a step with the plain model's whenever one is planned.
        methods: names of methods to plan beside forward.
        graph_breaks: whether a model may run as several graphs, each planned.
        max_plans: how many plans are kept.
    """

    budget: Budget
    solver: str | Solver = "auto"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    cost_model: str = "auto"
    cost_cache: str | os.PathLike[str] | None = None
    device: str | DeviceProfile | None = None
    reserve_bytes: int = 0
    run_ops: bool = True
    plan: Plan | None = None
    verify: bool = False
    methods: tuple[str, ...] = ()
    graph_breaks: bool = False
    max_plans: int = 64


def read_options(
    budget: Budget,
    given: PlanOptions,
    *,
    run_ops: bool = True,
    plan: Plan | None = None,
    verify: bool = False,
) -> Options:
    """Check what a user asked for, as far as that is possible before there is a graph.

    Raises:
        TypeError: there is no such option.
        BudgetError: the budget, the reserve or the cost model makes no sense.
        SolverError: there is no such solver, or it has no such option.
    """
    unknown = sorted(given.keys() - PlanOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(PlanOptions.__annotations__)}")
    cost_model = given.get("cost_model", "auto")
    if cost_model not in COST_MODELS:
        raise BudgetError(f"there is no cost model {cost_model!r}; choose one of {', '.join(COST_MODELS)}")
    if isinstance(budget, str):
        parse_bytes(budget)
    solver, effort = given.get("solver", "auto"), given.get("effort")
    solver_options = {**given.get("solver_options", {}), **({} if effort is None else {"effort": effort})}
    check_options(solver, solver_options)
    return Options(
        budget,
        solver,
        solver_options,
        cost_model,
        given.get("cost_cache"),
        given.get("device"),
        reserve_bytes=_reserve_bytes(given),
        run_ops=run_ops,
        plan=plan,
        verify=verify,
    )


def _reserve_bytes(given: PlanOptions) -> int:
    reserve, optimizer = given.get("reserve", 0), given.get("optimizer")
    reserve_bytes = parse_bytes(reserve) if isinstance(reserve, str) else reserve
    if isinstance(reserve_bytes, bool) or not isinstance(reserve_bytes, int) or reserve_bytes < 0:
        raise BudgetError(f"reserve must be a number of bytes, zero or more, not {reserve!r}")
    return reserve_bytes + (0 if optimizer is None else optimizer_state_bytes(optimizer))


def budget_in_bytes(budget: Budget, peak_bytes: int, device: torch.device) -> int:
    """The bound on the peak that a user's budget means where the plain model's peak is `peak_bytes` [B].

    Raises:
        BudgetError: it is not a size, not positive, a fraction outside (0, 1], or None on a device without memory of
            its own.
    """
    return free_bytes(device) if budget is None else within(budget, peak_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory that a CUDA device has for this process: what is free, and what torch holds already [B].

    Raises:
        BudgetError: the device is not a CUDA device.
    """
    if device.type != "cuda":
        raise BudgetError(
            f"memory_budget=None means the free memory of the CUDA device, but the model is on {device.type}: give a "
            'size such as memory_budget="8GB", or a fraction of the plain peak such as 0.5'
        )
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device)
