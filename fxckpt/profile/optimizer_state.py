"""Bytes of an optimizer's state, also before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxckpt.errors import BudgetError
from fxckpt.units import block_bytes_on, whole_blocks
from fxckpt.upstream.pytree import tensors_in
from fxckpt.upstream.tensors import device_of


def optimizer_state_bytes(optimizer: torch.optim.Optimizer | str, parameters: Iterable[torch.Tensor] = ()) -> int:
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
        kind, given = check_name(optimizer), [{"params": list(parameters)}]
    elif optimizer.state:
        return _tensor_bytes(optimizer.state)
    else:
        kind, given = type(optimizer), optimizer.param_groups
    groups = _groups(given)
    return _stepped_bytes(kind, groups, *_places(given)) if groups else 0


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


def _places(groups: Iterable[dict[str, Any]]) -> tuple[torch.device, torch.device]:
    """Where tensors of the state are that the copy has with its parameters, and those that it has on the CPU."""
    groups = list(groups)
    place = device_of(p for group in groups for p in group["params"] if p.requires_grad)
    return place, place if any(group.get("fused") for group in groups) else torch.device("cpu")


def _stepped_bytes(kind: Any, groups: list[dict[str, Any]], place: torch.device, other: torch.device) -> int:
    try:
        copy = kind(groups)
        copy.step()
    except Exception as error:
        raise BudgetError(
            f"the state of {kind.__name__} can't be foretold ({error}): run one step of it first, or declare its bytes "
            "with reserve="
        ) from error
    return _tensor_bytes(copy.state, place, other)


def _tensor_bytes(state: Any, place: torch.device | None = None, other: torch.device | None = None) -> int:
    """Bytes of a state, its tensors being where they are or, if they are on the meta device or not, in these places."""
    sizes_bytes: dict[str, int] = {}
    for tensor in tensors_in(list(state.values())):
        there = (place if tensor.is_meta else other) or tensor.device
        size_bytes = tensor.numel() * tensor.element_size()
        taken_bytes = whole_blocks(size_bytes, block_bytes_on(there.type))
        sizes_bytes[there.type] = sizes_bytes.get(there.type, 0) + taken_bytes
    return sizes_bytes["cuda"] if "cuda" in sizes_bytes else sum(sizes_bytes.values())
