"""Calls that run without their plan, though they want gradients: each says so once, with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from fxckpt.capture.structure import take_apart
from fxckpt.errors import CaptureError, PlanBypassedWarning
from fxckpt.upstream import pytree

_PLANNED = "_HeadBackward"
"""Name of the node by which a planned step's outputs hang on autograd's graph."""


class Bypasses:
    """The reasons for which a model's calls ran without a plan so far.

    Attributes:
        count: how many calls did.
    """

    def __init__(self) -> None:
        self.count = 0
        self._said: set[str] = set()

    def say(self, reason: str, *, stacklevel: int = 2) -> None:
        """Warn that a call runs without its plan; each reason once."""
        self.count += 1
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"{reason}, so this call ran without its plan: all activations are kept, whatever the budget",
                PlanBypassedWarning,
                stacklevel=stacklevel + 1,
            )


def wants_gradients(value: Any) -> bool:
    """Whether a backward could start from a tensor in a nested value."""
    return any(x.grad_fn is not None for x in _tensors(value))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a nested value, also inside of objects."""
    try:
        return take_apart(value)[0]
    except CaptureError:  # an object that can't be looked into
        return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def reaches(value: Any, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether a backward from a nested value would reach one of the parameters other than through a planned step."""
    wanted = {id(parameter) for parameter in parameters}
    pending: list[Any] = [x.grad_fn for x in _tensors(value)]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen or node.name() == _PLANNED:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        pending += [following for following, _ in node.next_functions]
    return False
