"""What modules and tensors keep about themselves: dictionaries of parts, and hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary in which a module has its submodules."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary in which a module has its own parameters."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The dictionary in which a module has its own buffers."""
    return module._buffers


def size_of(module: nn.Module) -> int:
    """How many submodules, parameters and buffers a module has."""
    return len(module._modules) + len(module._parameters) + len(module._buffers)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module's forward, or after its backward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def hooks_of(module: nn.Module) -> list[tuple[str, Any]]:
    """All hooks of a module, each with the name of its kind."""
    return [(kind.strip("_"), hook) for kind in _HOOKS for hook in getattr(module, kind).values()]


def gradient_hooks_of(tensor: torch.Tensor) -> dict[int, Any] | None:
    """The dictionary of the hooks that get a tensor's gradient; None if there never were any."""
    return tensor._backward_hooks


def has_accumulation_hooks(parameter: torch.Tensor) -> bool:
    """Whether something is called when the parameter's gradient is there, and may change the parameter then."""
    return bool(parameter._post_accumulate_grad_hooks)


def call_module(module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a module's forward and its hooks, as a module does that `compile` was not called of."""
    return module._call_impl(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether `nn.Module.compile` was called of the module."""
    return module._compiled_call_impl is not None
