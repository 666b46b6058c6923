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
    from fxckpt.api import advise, benchmark, graphs, max_batch, measure, optimize, pareto, plain, plan, print_plan
    from fxckpt.core.plans import Plan
    from fxckpt.errors import FxckptError, InfeasibleBudgetError

__version__ = "0.1.0"

__all__ = [
    "FxckptError",
    "InfeasibleBudgetError",
    "Plan",
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

_HOMES = {"FxckptError": "errors", "InfeasibleBudgetError": "errors", "Plan": "core.plans"}
"""Where names live that are not in `api`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
