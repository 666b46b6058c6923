"""Bytes of an optimizer's state, also before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxckpt.errors import BudgetError


def optimizer_state_bytes(optimizer: torch.optim.Optimizer | str, parameters: Iterable[torch.nn.Parameter] = ()) -> int:
    """Bytes of the tensors that an optimizer keeps between steps [B].

    An optimizer that has not stepped yet is copied onto the meta device, where a step costs nothing, and the copy's
    state counted.

    Args:
        optimizer: an optimizer, or the name of one in `torch.optim`, whose own defaults are then taken.
        parameters: what an optimizer that is known by name steps.

    Raises:
        BudgetError: there is no optimizer of that name, or it can't step on the meta device.
    """
    if isinstance(optimizer, str):
        groups = _groups([{"params": list(parameters)}])
        return _stepped_bytes(check_name(optimizer), groups) if groups else 0
    if optimizer.state:
        return _tensor_bytes(optimizer.state)
    groups = _groups(optimizer.param_groups)
    return _stepped_bytes(type(optimizer), groups) if groups else 0


def check_name(name: str) -> Any:
    """The class of this name in `torch.optim`.

    Raises:
        BudgetError: there is none.
    """
    kind = getattr(torch.optim, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise BudgetError(f"torch.optim has no optimizer {name!r}: name one of its classes, such as AdamW")
    return kind


def _groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with parameters on the meta device, each with a gradient."""
    made = []
    for group in groups:
        params = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"] if p.requires_grad]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        if params:
            made.append({**group, "params": params, **({"fused": False} if "fused" in group else {})})
    return made


def _stepped_bytes(kind: Any, groups: list[dict[str, Any]]) -> int:
    try:
        copy = kind(groups)
        copy.step()
    except Exception as error:
        raise BudgetError(
            f"the state of {kind.__name__} can't be foretold ({error}): run one step of it first, or declare its bytes "
            "with reserve="
        ) from error
    return _tensor_bytes(copy.state)


def _tensor_bytes(state: Any) -> int:
    leaves = pytree.tree_leaves(list(state.values()))
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
