"""Strides of what elementwise kernels compute, as torch's TensorIterator chooses them.

Descriptions of such ops canonicalize the strides of dims of size 1, which are ambiguous. But kernels behind them look
at all strides to choose a memory format, and views fail or copy by them. And where types differ, or are computed in
another, descriptions convert the operands first, which lays out anew those that are expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensorMode

from fxckpt.upstream import pytree
from fxckpt.upstream.operators import OpOverload, changes_arguments

aten = torch.ops.aten

_OTHERWISE = frozenset({aten.clone, aten.log_sigmoid_forward})
"""Tagged as elementwise, but no TensorIterator makes their results."""
_TAKES_NUMBERS = frozenset(
    {
        aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.floor_divide, aten.fmod, aten.remainder, aten.where,
        aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor,
    }
)  # fmt: skip
"""A number among their arguments becomes a tensor, an operand like others."""
_COMPUTED_AS_THEY_ARE = ({torch.float32}, {torch.float64})
_UNTAGGED = frozenset({aten.floor_divide, aten.hardswish, aten.hardtanh})
_LIKE = frozenset(
    {
        aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like,
        aten._to_copy, aten.flip,
    }
)  # fmt: skip
"""Their results have all the strides of what they are like, if that is dense."""


def described(
    original: Callable[..., Any], mode: FakeTensorMode, op: OpOverload, types: Any, args: Any, kwargs: Any
) -> Any:
    """The description of an op, with the right strides if it is an elementwise one."""
    result = original(mode, op, types, args, kwargs)
    if not isinstance(result, Tensor) or (1 not in result.shape and not _converts(op, result, args, kwargs)):
        return result
    strides = _strides(op, result, args, kwargs)
    if strides == result.stride():
        return result
    with mode:
        return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device)


def _converts(op: OpOverload, result: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether operands are converted, and say different things about the layout of the result."""
    if torch.Tag.pointwise not in op.tags or op.overloadpacket in _LIKE or op.overloadpacket is aten.masked_fill:
        return False
    operands = pytree.tensors_in((args, kwargs))
    strides, types = {x.stride() for x in operands}, {x.dtype for x in (*operands, result)}
    return strides != {result.stride()} and types not in _COMPUTED_AS_THEY_ARE


def _strides(op: OpOverload, result: Tensor, args: Any, kwargs: Any) -> tuple[int, ...]:
    kind, operands = op.overloadpacket, pytree.tensors_in((args, kwargs))
    if kind in _LIKE:
        keeps = kwargs.get("memory_format") in (None, torch.preserve_format)
        dense = keeps and is_non_overlapping_and_dense_or_false(operands[0])
        return tuple((operands[0] if dense else result).stride())
    if kind is aten.masked_fill:
        return tuple(torch.empty(result.shape, device="meta").stride())
    is_elementwise = torch.Tag.pointwise in op.tags or kind in _UNTAGGED
    if not is_elementwise or kind in _OTHERWISE or changes_arguments(op) or not operands:
        return tuple(result.stride())
    shapes_agree = kind not in _TAKES_NUMBERS or not any(isinstance(x, (int, float, complex)) for x in args)
    return strides_of_result(tuple(result.shape), operands, shapes_agree=shapes_agree)


def strides_of_result(
    shape: tuple[int, ...], operands: Sequence[Tensor], *, shapes_agree: bool = True
) -> tuple[int, ...]:
    """The strides of a new result of this shape that is computed of the operands element by element.

    `shapes_agree` is false if there are operands beside these, which are numbers.

    As `TensorIteratorBase::fast_set_up`, else `reorder_dimensions` and `allocate_or_resize_outputs`, have it.
    """
    if shapes_agree and all(tuple(x.shape) == shape for x in operands):
        if all(x.is_contiguous() for x in operands):
            return _in_order(shape, range(len(shape) - 1, -1, -1))
        if len(shape) == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in operands):
            return _in_order(shape, (1, 3, 2, 0))
        if len({x.stride() for x in operands}) == 1 and is_non_overlapping_and_dense_or_false(operands[0]):
            return tuple(operands[0].stride())
    return _in_order(shape, _order(shape, [_broadcast_strides(x, shape) for x in operands]))


def _in_order(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dims lie in this order, the first one innermost."""
    strides, step = [0] * len(shape), 1
    for dim in dims:
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def _broadcast_strides(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in bytes, zero where the operand is broadcast."""
    missing = len(shape) - x.dim()
    own = [
        0 if size == 1 != whole else stride
        for size, stride, whole in zip(x.shape, x.stride(), shape[missing:], strict=True)
    ]
    return (*[0] * missing, *(stride * x.element_size() for stride in own))


def _order(shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]) -> list[int]:
    """The dims from inner to outer, sorted by the operands' strides; what is broadcast says nothing."""
    order = list(range(len(shape) - 1, -1, -1))
    for start in range(1, len(order)):
        at = start
        for before in range(start - 1, -1, -1):
            comparison = _compared(shape, strides, order[before], order[at])
            if comparison > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif comparison < 0:
                break
    return order


def _compared(shape: tuple[int, ...], strides: Sequence[tuple[int, ...]], first: int, second: int) -> int:
    """Whether the second dim belongs before the first (1), behind it (-1), or is not decided (0)."""
    for each in strides:
        a, b = each[first], each[second]
        if not a or not b:
            continue
        if a != b:
            return -1 if a < b else 1
        if shape[first] > shape[second]:
            return 1
    return 0
