"""What a user may ask for: each option once, in `Options`. Keyword arguments and the command line follow from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from fxckpt.core.plans import Plan
from fxckpt.core.solvers import Solver, check_options
from fxckpt.errors import BudgetError
from fxckpt.units import parse_bytes

if TYPE_CHECKING:
    import torch

    from fxckpt.core.solvers.chain.dp import Effort
    from fxckpt.profile.devices import DeviceProfile

Budget = str | int | float | None
"""A size such as "8GB", bytes, a fraction of the plain model's peak, or None for what the CUDA device has free."""

CostModelName = Literal["auto", "estimate", "measure", "reference"]
Gradients = Literal["auto", "fresh", "allocated"]
BackendName = Literal["python", "inductor", "auto"]


@dataclass(frozen=True)
class Flag:
    """An option on the command line.

    Attributes:
        help: what it does.
        metavar: what stands for its value.
        choices: what its value may be; empty: anything.
        name: what it is called, if not as the option.
        repeated: whether it may be given several times, each time as NAME=VALUE.
    """

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    name: str = ""
    repeated: bool = False


def _on_command_line(
    help: str,  # noqa: A002 (as argparse calls it)
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    name: str = "",
    repeated: bool = False,
) -> dict[str, Flag]:
    return {"flag": Flag(help, metavar, choices, name, repeated)}


@dataclass(frozen=True)
class Options:
    """How to plan. The fields with a flag are keyword arguments of all that plans.

    Attributes:
        budget: bound on the peak.
        solver: name of a solver (see `fxckpt.core.solvers.SOLVERS`), or a function from a graph and a budget in bytes
            to a schedule.
        effort: how long to search, "fast", "default" or "max": milliseconds, seconds, or up to a minute for some
            hundred ops. For solvers that search: auto, dp, min_memory.
        solver_options: further arguments of the solver, such as {"k": 3} for "uniform".
        cost_model: "measure" times the ops on the device, "estimate" computes from FLOPs and bytes, "reference" is a
            fixed device; "auto", the default, measures where ops may be run: in `optimize`, on a real device.
        cost_cache: where measured costs are kept from one process to the next: in the user's folder of caches ("auto",
            the default), nowhere ("off"), or in the JSON file of this name, which is made if it is not there.
        device: what to estimate times for: "H100" or another that the guide lists, "cuda" for the CUDA device at hand,
            of which some rates are then measured once, "cpu", or a `DeviceProfile`. By default where the model is, or
            an A100 for the meta device.
        optimizer: its state counts towards the peak. An optimizer, or the name of one in `torch.optim`, such as
            "AdamW", which is then counted for all parameters that require grad.
        reserve: bytes to leave for other things, as a number or a size such as "1GB".
        gradients: for plans that are only looked at: whether `.grad` is None before the step ("fresh"), holds tensors
            ("allocated"), or is as the model has it now ("auto").
        run_ops: whether ops may be run to find their workspace and time.
        plan: a plan to apply instead of solving.
        verify: whether to compare a step with the plain model's whenever one is planned.
        backend: what runs a plan: "python" calls op after op, bit for bit what eager computes; "inductor" fuses ops, as
            torch.compile does, whose bits it then has; "auto" takes Inductor on CUDA and Python elsewhere.
        bitwise: whether gradients must be eager's bits; "auto" then takes Python everywhere.
        methods: names of methods to plan beside forward.
        graph_breaks: whether a model may run as several graphs, each planned.
        max_plans: how many plans are kept.

    Raises:
        BudgetError: the budget, the reserve, the optimizer's name, the cost model or `gradients` makes no sense.
        SolverError: there is no such solver, or it has no such option.
    """

    budget: Budget
    solver: str | Solver = field(default="auto", metadata=_on_command_line("name of a solver (default: auto)"))
    effort: Effort | None = field(default=None, metadata=_on_command_line("how long to search: fast, default or max"))
    solver_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=_on_command_line(
            "a further option of the solver, such as k=3 for uniform; may be given several times",
            metavar="NAME=VALUE",
            name="solver-option",
            repeated=True,
        ),
    )
    cost_model: str = field(
        default="auto", metadata=_on_command_line(f"where times come from: {', '.join(get_args(CostModelName))}")
    )
    cost_cache: str | os.PathLike[str] = field(
        default="auto",
        metadata=_on_command_line(
            "keep measured costs in this JSON file, or nowhere (off; default: in the user's cache)", metavar="FILE"
        ),
    )
    device: str | DeviceProfile | None = field(
        default=None,
        metadata=_on_command_line("what to estimate times for, such as H100 (default: where the model is)"),
    )
    optimizer: torch.optim.Optimizer | str | None = field(
        default=None, metadata=_on_command_line("count the state of this optimizer of torch.optim, such as AdamW")
    )
    reserve: int | str = field(
        default=0, metadata=_on_command_line("memory to leave for other things, such as 1GB", metavar="SIZE")
    )
    gradients: Gradients = field(
        default="auto",
        metadata=_on_command_line(
            "whether .grad is empty or filled before the step (default: auto)", choices=get_args(Gradients)
        ),
    )
    backend: BackendName = field(
        default="python",
        metadata=_on_command_line("what runs the plan (default: python)", choices=get_args(BackendName)),
    )
    bitwise: bool = False
    run_ops: bool = True
    plan: Plan | None = None
    verify: bool = False
    methods: tuple[str, ...] = ()
    graph_breaks: bool = False
    max_plans: int = 64

    def __post_init__(self) -> None:
        if self.cost_model not in get_args(CostModelName):
            names = ", ".join(get_args(CostModelName))
            raise BudgetError(f"there is no cost model {self.cost_model!r}; choose one of {names}")
        if self.gradients not in get_args(Gradients):
            raise BudgetError(f'gradients must be "auto", "fresh" or "allocated", not {self.gradients!r}')
        if self.backend not in get_args(BackendName):
            raise BudgetError(f'backend must be "python", "inductor" or "auto", not {self.backend!r}')
        if self.bitwise and self.backend == "inductor":
            raise BudgetError(
                'backend="inductor" has the bits of torch.compile, not those of eager that bitwise=True asks for: use '
                'backend="python", or leave bitwise out'
            )
        if isinstance(self.budget, str):
            parse_bytes(self.budget)
        _ = self.reserve_bytes
        check_options(self.solver, self.solver_arguments)

    @cached_property
    def reserve_bytes(self) -> int:
        """What is to be left for other things, an optimizer that is known by name only left out [B]."""
        reserve_bytes = parse_bytes(self.reserve) if isinstance(self.reserve, str) else self.reserve
        if isinstance(reserve_bytes, bool) or not isinstance(reserve_bytes, int) or reserve_bytes < 0:
            raise BudgetError(f"reserve must be a number of bytes, zero or more, not {self.reserve!r}")
        return reserve_bytes

    def fuses(self, device: torch.device) -> bool:
        """Whether plans for a device are run by Inductor."""
        return self.backend == "inductor" or (self.backend == "auto" and not self.bitwise and device.type == "cuda")

    @cached_property
    def solver_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the solver."""
        return {**self.solver_options, **({} if self.effort is None else {"effort": self.effort})}


class OptimizeOptions(TypedDict, total=False):
    """The options of `optimize`, for type checkers: names and types are those of `Options`."""

    solver: str | Solver
    effort: Effort | None
    solver_options: Mapping[str, Any]
    cost_model: str
    cost_cache: str | os.PathLike[str]
    device: str | DeviceProfile | None
    optimizer: torch.optim.Optimizer | str | None
    reserve: int | str
    backend: BackendName
    bitwise: bool


class PlanOptions(OptimizeOptions, total=False):
    """The options of all that only plans."""

    gradients: Gradients


def flags() -> dict[str, Flag]:
    """The options with their flags, by name."""
    return {f.name: f.metadata["flag"] for f in fields(Options) if "flag" in f.metadata}


def read_options(budget: Budget, given: Mapping[str, Any], *, only_plans: bool = False, **more: Any) -> Options:
    """What a user asked for, checked as far as that is possible before there is a graph.

    Args:
        budget: bound on the peak.
        given: the keyword arguments.
        only_plans: whether nothing but a plan is wanted: then no op is run unless "measure" is asked for.
        **more: the fields of `Options` that are no options.

    Raises:
        TypeError: there is no such option.
        BudgetError, SolverError: see `Options`.
    """
    known = [name for name in (*flags(), "bitwise") if only_plans or name != "gradients"]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(known)}")
    options = Options(budget, **given, **more)
    if only_plans:
        cost_model = "estimate" if options.cost_model == "auto" else options.cost_model
        options = replace(options, cost_model=cost_model, run_ops=cost_model == "measure")
    return _without_optimizer(options)


def _without_optimizer(options: Options) -> Options:
    """The same with an optimizer's bytes in its place: whoever keeps the options does not keep the optimizer."""
    if options.optimizer is None:
        return options
    from fxckpt.profile.optimizer_state import check_name, optimizer_state_bytes

    if isinstance(options.optimizer, str):
        check_name(options.optimizer)
        return options
    reserve_bytes = options.reserve_bytes + optimizer_state_bytes(options.optimizer)
    return replace(options, optimizer=None, reserve=reserve_bytes)
