"""What torch tells of an operator: whether it is one, what it changes, returns and takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn import _reduction

from fxckpt.upstream.patching import attribute_replaced

__all__ = [
    "ADD",
    "ASSERT_ASYNC",
    "ATTENTION",
    "ATTENTION_BACKWARD",
    "ATTENTION_WITH_SEED_ON_CPU",
    "CHECK_ERRORS",
    "MEAN",
    "NO_REDUCTION",
    "UNSAFE_VIEW",
    "HigherOrderOperator",
    "OpOverload",
    "argument_names",
    "called_name",
    "changes_arguments",
    "changes_by_name",
    "is_operator",
    "python_kernels",
    "returns_nothing",
]

aten = torch.ops.aten

ADD: OpOverload = aten.add.Tensor
"""The sum of two tensors."""
ASSERT_ASYNC: OpOverload = aten._assert_async.default
"""Raises an error if a value is false."""
CHECK_ERRORS: OpOverload = aten._linalg_check_errors.default
"""Raises an error if a matrix could not be decomposed."""
UNSAFE_VIEW: OpOverload = aten._unsafe_view.default
"""A view that autograd does not know as one."""
ATTENTION: tuple[Any, ...] = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
)
"""The fused kernels of attention, on CPU and on GPUs: of queries, keys, values and more."""
ATTENTION_BACKWARD: tuple[Any, ...] = tuple(getattr(aten, f"{kernel.__name__}_backward") for kernel in ATTENTION)
"""Their backwards: of the result's gradient, queries, keys, values and more."""

ATTENTION_WITH_SEED_ON_CPU: OpOverload = aten._scaled_dot_product_efficient_attention.default
"""Memory-efficient attention: its last two results are on the CPU, where torch describes them as on the GPU."""

NO_REDUCTION, MEAN = _reduction.get_enum("none"), _reduction.get_enum("mean")
"""Arguments by which losses are told what to do with their terms."""


def is_operator(target: Any) -> TypeGuard[OpOverload]:
    """Whether what a node calls is an operator of torch's dispatcher, in one of its overloads."""
    return isinstance(target, OpOverload)


def changes_arguments(op: OpOverload) -> bool:
    """Whether the operator changes what it is given."""
    return bool(op._schema.is_mutable)


def returns_nothing(op: OpOverload) -> bool:
    """Whether the operator has no results: it looks at its arguments, or acts on them."""
    return not op._schema.returns


def argument_names(op: OpOverload) -> tuple[str, ...]:
    """Names of the operator's arguments, in order."""
    return tuple(argument.name for argument in op._schema.arguments)


_IN_PLACE = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_CHANGES = frozenset({"setitem", "__setitem__", "__set__"}).union(
    *({f"i{name}", f"__i{name}__"} for name in _IN_PLACE),
)


def called_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls, "" if it has none."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def changes_by_name(name: str, keywords: Collection[str]) -> bool:
    """Whether a function of this name, called with these keyword arguments, changes what it is given."""
    return name in _CHANGES or "out" in keywords or (name.endswith("_") and not name.endswith("__"))


@contextlib.contextmanager
def python_kernels(op: OpOverload, kernels: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """These are the implementations of an operator in Python, by dispatch key, for this thread."""
    with attribute_replaced(op, "py_kernels", dict(kernels)), attribute_replaced(op, "_dispatch_cache", {}):
        yield
