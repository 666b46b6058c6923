"""Bytes of an optimizer's state, also before its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxckpt.errors import BudgetError


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps between steps [B].

    An optimizer that has not stepped yet is copied onto the meta device, where a step costs nothing, and the copy's
    state counted.

    Raises:
        BudgetError: the optimizer can't step on the meta device.
    """
    if optimizer.state:
        return _tensor_bytes(optimizer.state)
    groups = []
    for group in optimizer.param_groups:
        params = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"] if p.requires_grad]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        if params:
            groups.append({**group, "params": params, **({"fused": False} if "fused" in group else {})})
    if not groups:
        return 0
    try:
        make: Any = type(optimizer)
        copy = make(groups)
        copy.step()
    except Exception as error:
        raise BudgetError(
            f"the state of {type(optimizer).__name__} can't be foretold ({error}): run one step of it first, or "
            f"declare its "
            "bytes with reserve="
        ) from error
    return _tensor_bytes(copy.state)


def _tensor_bytes(state: Any) -> int:
    leaves = pytree.tree_leaves(list(state.values()))
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
