"""Activation checkpointing as a compiler pass.

    model = fxckpt.optimize(model, memory_budget="8GB")
    fxckpt.print_plan(model)

A budget in bytes of peak memory, the same gradients, the least time. Names are imported when they are first used, so
that the planning core can be used without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxckpt.api import graphs, measure, optimize, plan, print_plan
    from fxckpt.errors import CaptureError, FxckptError, InfeasibleBudgetError, PlanMismatchError
    from fxckpt.plans import Plan

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "FxckptError",
    "InfeasibleBudgetError",
    "Plan",
    "PlanMismatchError",
    "graphs",
    "measure",
    "optimize",
    "plan",
    "print_plan",
]

_HOMES = {
    "CaptureError": "errors",
    "FxckptError": "errors",
    "InfeasibleBudgetError": "errors",
    "Plan": "plans",
    "PlanMismatchError": "errors",
    "graphs": "api",
    "measure": "api",
    "optimize": "api",
    "plan": "api",
    "print_plan": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
