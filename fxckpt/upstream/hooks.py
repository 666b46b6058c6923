"""What modules and tensors keep about themselves: dictionaries of parts, and hooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CALL = nn.Module._call_impl.__name__


Key = TypeVar("Key", str, int)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary in which a module has its submodules."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary in which a module has its own parameters."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The dictionary in which a module has its own buffers."""
    return module._buffers


def sizes_of(modules: Iterable[tuple[str, nn.Module]]) -> tuple[int, ...]:
    """How many submodules, parameters and buffers each of some named modules has."""
    return tuple([len(m._modules) + len(m._parameters) + len(m._buffers) for _, m in modules])


def which_have_hooks(modules: Iterable[tuple[str, nn.Module]]) -> tuple[bool, ...]:
    """For each of some named modules whether something is called around its forward, or after its backward."""
    return tuple([bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for _, m in modules])


def hooks_of(module: nn.Module) -> list[tuple[str, Any]]:
    """All hooks of a module, each with the name of its kind."""
    return [(kind.strip("_"), hook) for kind in _HOOKS for hook in getattr(module, kind).values()]


def gradient_hooks_of(tensor: torch.Tensor) -> dict[int, Any] | None:
    """The dictionary of the hooks that get a tensor's gradient; None if there never were any."""
    return tensor._backward_hooks


def with_hooks_noted(tensor: torch.Tensor) -> dict[int, Any]:
    """The dictionary in which the hooks will be that get a tensor's gradient, even when the tensor is gone."""
    tensor.register_hook(_nothing).remove()
    hooks = gradient_hooks_of(tensor)
    assert hooks is not None
    return hooks


def _nothing(_: torch.Tensor) -> None:
    """A hook that looks at nothing."""


def with_accumulation_hooks(parameters: Iterable[tuple[Key, torch.Tensor | None]]) -> frozenset[Key]:
    """Names, or numbers, of the parameters for which something is called when their gradient is there.

    It may change them then.
    """
    return frozenset([name for name, p in parameters if p is not None and p._post_accumulate_grad_hooks])


def is_call_of_module(code: CodeType) -> bool:
    """Whether the code is what runs when a module is called: its hooks and its forward."""
    return code.co_name == _CALL


def call_module(module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a module's forward and its hooks, as a module does that `compile` was not called of."""
    return module._call_impl(*args, **kwargs)
