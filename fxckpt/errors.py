"""Every exception fxckpt raises on purpose, and its warnings. Catch `FxckptError` to catch all exceptions."""

from __future__ import annotations

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
    "PlanBypassedWarning",
    "PlanFormatError",
    "PlanMismatchError",
    "ReplanningWarning",
    "RuntimeContractError",
    "SolverError",
    "UnguardedCaptureWarning",
    "VerificationError",
]


class FxckptError(Exception):
    """Base class of all errors raised by fxckpt."""


class BudgetError(FxckptError, ValueError):
    """A memory budget, or another size, that can't be read as a number of bytes."""


class CaptureError(FxckptError, RuntimeError):
    """The model's forward and backward can't be captured as one graph."""


class CompilationError(FxckptError, RuntimeError):
    """Torch's compiler failed on a part of a plan that it was to run."""


class CheckpointingBypassedWarning(UserWarning):
    """The model checkpoints activations itself; an optimized module ignores that and follows its plan."""


class MeasuringWarning(UserWarning):
    """Costs of ops could not be measured or kept, so they are estimated or measured again."""


class OverBudgetWarning(UserWarning):
    """A plan made elsewhere has a higher peak here than the budget."""


class PlanBypassedWarning(UserWarning):
    """A call of an optimized module ran its plain forward, which keeps all activations."""


class ReplanningWarning(UserWarning):
    """A model is captured and planned anew at each call, since something is new at each."""


class UnguardedCaptureWarning(UserWarning):
    """TorchDynamo can't trace a model, so that little of the Python state that its forward reads is watched."""


class InvalidScheduleError(FxckptError, ValueError):
    """A schedule reads a storage that is not live, repeats what must not be repeated, or misses an op."""


class InfeasibleBudgetError(FxckptError, ValueError):
    """No schedule that the solver can find fits the budget.

    Attributes:
        budget_bytes: the budget that was asked for [B].
        floor_bytes: the smallest peak the solver reached [B]; a budget of this size works.
    """

    def __init__(self, message: str, *, budget_bytes: int, floor_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return (_infeasible, (str(self), self.budget_bytes, self.floor_bytes))


def _infeasible(message: str, budget_bytes: int, floor_bytes: int) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(message, budget_bytes=budget_bytes, floor_bytes=floor_bytes)


class SolverError(FxckptError, RuntimeError):
    """A solver is unknown, was given options it does not have, or returned a schedule that breaks its contract."""


class CostCacheError(FxckptError, ValueError):
    """A file of measured costs is damaged, or can't be read or written."""


class PlanMismatchError(FxckptError, ValueError):
    """A plan was made for another graph than the one it is applied to."""


class PlanFormatError(FxckptError, ValueError):
    """A plan file is damaged, too large, or not a plan."""


class VerificationError(FxckptError, AssertionError):
    """An emitted graph does not execute its schedule, or a run differs from the plain model."""


class RuntimeContractError(FxckptError, RuntimeError):
    """An optimized module was used in a way that can't give the plain model's gradients."""


class MissingExtraError(FxckptError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""
