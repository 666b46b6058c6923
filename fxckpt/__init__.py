"""Activation checkpointing as a compiler pass.

    model = fxckpt.optimize(model, memory_budget="8GB")
    fxckpt.print_plan(model)

A budget in bytes of peak memory, the same gradients, the least time. Names are imported when they are first used, so
that the planning core can be used without torch. Every exception and warning of fxckpt is here too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxckpt.api import advise, benchmark, graphs, max_batch, measure, optimize, pareto, plain, plan, print_plan
    from fxckpt.core.plans import Plan
    from fxckpt.errors import (
        BudgetError,
        CaptureError,
        CheckpointingBypassedWarning,
        CompilationError,
        CostCacheError,
        FxckptError,
        InfeasibleBudgetError,
        InvalidScheduleError,
        MeasuringWarning,
        MissingExtraError,
        OverBudgetWarning,
        PlanBypassedWarning,
        PlanFormatError,
        PlanMismatchError,
        ReplanningWarning,
        RuntimeContractError,
        SolverError,
        UnguardedCaptureWarning,
        VerificationError,
    )

__version__ = "0.1.0"
"""The only place where it is written: the build reads it here."""

__all__ = [
    "BudgetError",
    "CaptureError",
    "CheckpointingBypassedWarning",
    "CompilationError",
    "CostCacheError",
    "FxckptError",
    "InfeasibleBudgetError",
    "InvalidScheduleError",
    "MeasuringWarning",
    "MissingExtraError",
    "OverBudgetWarning",
    "Plan",
    "PlanBypassedWarning",
    "PlanFormatError",
    "PlanMismatchError",
    "ReplanningWarning",
    "RuntimeContractError",
    "SolverError",
    "UnguardedCaptureWarning",
    "VerificationError",
    "advise",
    "benchmark",
    "graphs",
    "max_batch",
    "measure",
    "optimize",
    "pareto",
    "plain",
    "plan",
    "print_plan",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_home(name)}"), name)


def _home(name: str) -> str:
    """The module that a name is in."""
    if name.endswith(("Error", "Warning")):
        return "errors"
    return "core.plans" if name == "Plan" else "api"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
