"""Calls that run without their plan, though they want gradients: each says so once, with the reason."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxckpt.errors import PlanBypassedWarning


class Bypasses:
    """The reasons for which a model's calls ran without a plan so far."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, reason: str, *, stacklevel: int = 2) -> None:
        """Warn that a call runs without its plan; each reason once."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"{reason}, so this call ran without a plan: all activations are kept, whatever the budget",
                PlanBypassedWarning,
                stacklevel=stacklevel + 1,
            )


def wants_gradients(value: Any) -> bool:
    """Whether a backward could start from a tensor in a nested value."""
    return any(isinstance(x, torch.Tensor) and x.grad_fn is not None for x in pytree.tree_leaves(value))
