"""Kernels whose results torch describes in a wrong layout, and what layout they have.

While a graph is traced nothing is computed; a description of each op tells shapes and strides. For some it is derived
from other ops than the kernel is made of, and tells other strides where values are transposed, or gradients come in
another layout than values: then copies would be traced that eager does not make, and others left out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten


def _as_product(*args: Any) -> Tensor:
    """As elementwise kernels of one or two tensors do."""
    first, *others = [x for x in args if isinstance(x, Tensor)][:2]
    return torch.mul(first, *others) if others else torch.empty_like(first)


def _contiguous(*args: Any) -> Tensor:
    first = next(x for x in args if isinstance(x, Tensor))
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _in_format(x: Tensor, *_: Any) -> Tensor:
    """Channels last or contiguous, whichever the strides look like."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _in_format_of_second(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return _in_format(x)


def _as_parts_joined(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """`roll` joins the two parts of each dim that it moves."""
    if not dims:
        return _contiguous(x)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % max(x.shape[dim], 1)
        x = torch.cat((x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)), dim)
    return x


def _as_noise(gradient: Tensor, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool, _: Any) -> Tensor:
    return torch.mul(noise, gradient) if training and upper - lower > 1e-6 else torch.mul(x, gradient)


LAID_OUT_LIKE: dict[OpOverload, Callable[..., Tensor]] = {
    aten.copysign.Tensor: _as_product,
    aten.div.Tensor_mode: _as_product,
    aten.floor_divide.default: _as_product,
    aten.xlogy.Tensor: _as_product,
    aten.pow.Scalar: _contiguous,
    aten.log_sigmoid_forward.default: _contiguous,
    aten.native_dropout_backward.default: _as_product,
    aten.elu_backward.default: _as_product,
    aten.hardsigmoid_backward.default: _as_product,
    aten.hardswish_backward.default: _as_product,
    aten.hardtanh_backward.default: _as_product,
    aten.logit_backward.default: _as_product,
    aten.softplus_backward.default: _as_product,
    aten.rrelu_with_noise_backward.default: _as_noise,
    aten.huber_loss_backward.default: _contiguous,
    aten.mse_loss_backward.default: _contiguous,
    aten.smooth_l1_loss_backward.default: _contiguous,
    aten._log_softmax_backward_data.default: _contiguous,
    aten.native_layer_norm_backward.default: _contiguous,
    aten.channel_shuffle.default: _in_format,
    aten.roll.default: _as_parts_joined,
    aten.replication_pad2d_backward.default: _in_format_of_second,
    aten.native_batch_norm.default: _in_format,
    aten._native_batch_norm_legit.default: _in_format,
    aten._native_batch_norm_legit.no_stats: _in_format,
    aten._native_batch_norm_legit_functional.default: _in_format,
    aten._native_batch_norm_legit_no_training.default: _in_format,
    aten.native_batch_norm_backward.default: _in_format_of_second,
    aten.native_group_norm_backward.default: _in_format_of_second,
}
"""From an op's arguments to a tensor with the strides of its (first) result on CPU."""


@contextlib.contextmanager
def right_strides() -> Iterator[None]:
    """Let the descriptions of these ops be right."""
    shortcuts = {op: decomposition_table.pop(op) for op in LAID_OUT_LIKE if op in decomposition_table}
    before = {op: op.py_kernels[DispatchKey.Meta] for op in LAID_OUT_LIKE}
    for op, rule in LAID_OUT_LIKE.items():
        _describe(op, functools.partial(_corrected, before[op], rule))
    try:
        yield
    finally:
        decomposition_table.update(shortcuts)  # type: ignore[arg-type]
        for op, description in before.items():
            _describe(op, description)


def _describe(op: OpOverload, description: Callable[..., Any]) -> None:
    op.py_kernels[DispatchKey.Meta] = description
    op._dispatch_cache.clear()


def _corrected(description: Callable[..., Any], rule: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    results = description(*args, **kwargs)
    first = results[0] if isinstance(results, tuple) else results
    if first is None:
        return results
    right = first.new_empty_strided(first.shape, rule(*args).stride())
    return (right, *results[1:]) if isinstance(results, tuple) else right
