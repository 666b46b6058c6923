"""Kernels whose results torch describes in a wrong layout, or too large, and what form they have.

While a graph is traced nothing is computed; a description of each op tells shapes and strides. For some it is derived
from other ops than the kernel is made of, and tells other strides where values are transposed, or gradients come in
another layout than values: then copies would be traced that eager does not make, and others left out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, _decomp
from torch._C import DispatchKey
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode

from fxckpt.upstream import elementwise
from fxckpt.upstream.fakes import descriptions_apart
from fxckpt.upstream.operators import OpOverload, python_kernels
from fxckpt.upstream.patching import attribute_replaced, function_replaced

aten = torch.ops.aten

Results = tuple[Tensor | None, ...]


def _as_product(_: Tensor, *args: Any) -> Tensor:
    """As elementwise kernels of one or two tensors do."""
    first, *others = [x for x in args if isinstance(x, Tensor)][:2]
    return torch.mul(first, *others) if others else torch.empty_like(first)


def _contiguous(result: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


def _in_format(result: Tensor, x: Tensor, *_: Any) -> Tensor:
    """Channels last or contiguous, whichever the strides of `x` look like."""
    return torch.empty_like(result, memory_format=suggest_memory_format(x))


def _in_format_of_second(result: Tensor, _: Tensor, x: Tensor, *__: Any) -> Tensor:
    return _in_format(result, x)


def _as_second(_: Tensor, __: Tensor, x: Tensor, *___: Any) -> Tensor:
    return torch.empty_like(x)


def _as_second_in_order(_: Tensor, __: Tensor, x: Tensor, *___: Any) -> Tensor:
    return _contiguous(x)


def _as_parts_joined(_: Tensor, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """`roll` joins the two parts of each dim that it moves."""
    if not dims:
        return _contiguous(x)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % max(x.shape[dim], 1)
        x = torch.cat((x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)), dim)
    return x


def _as_noise(
    _: Tensor, gradient: Tensor, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool, *__: Any
) -> Tensor:
    return torch.mul(noise, gradient) if training and upper - lower > 1e-6 else torch.mul(x, gradient)


def _first(rule: Callable[..., Tensor]) -> Callable[..., Results]:
    """Of several results, the first, if it is wanted."""
    return lambda results, *args: (results[0] if results[0] is None else rule(results[0], *args), *results[1:])


def _each(rule: Callable[..., Tensor]) -> Callable[..., Results]:
    return lambda results, *args: tuple(x if x is None else rule(x, *args) for x in results)


def _batch_norm(training_index: int | None, results: tuple[Tensor, ...], x: Tensor, *args: Any) -> Results:
    """Statistics have the type of parameters; in evaluation there are none of the batch to save."""
    output, *statistics = results
    training = training_index is not None and args[training_index - 1]
    dtype = next((y.dtype for y in args if isinstance(y, Tensor)), x.dtype)
    shapes = [y.shape if training or i >= 2 else (0,) for i, y in enumerate(statistics)]
    return _in_format(output, x), *(x.new_empty(shape, dtype=dtype) for shape in shapes)


LAID_OUT_LIKE: dict[OpOverload, Callable[..., Tensor | Results]] = {
    aten.copysign.Tensor: _as_product,
    aten.heaviside.default: _as_product,
    aten.logaddexp.default: _as_product,
    aten.logical_and.default: _as_product,
    aten.logical_or.default: _as_product,
    aten.logical_xor.default: _as_product,
    aten.div.Tensor_mode: _as_product,
    aten.floor_divide.default: _as_product,
    aten.xlogy.Tensor: _as_product,
    aten.pow.Scalar: _contiguous,
    aten.log_sigmoid_forward.default: _each(_contiguous),
    aten.normal.Tensor_Tensor: _contiguous,
    aten.binary_cross_entropy_backward.default: _as_second,
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
    aten.native_layer_norm_backward.default: _each(_contiguous),
    aten.glu_backward.default: _as_second_in_order,
    aten.channel_shuffle.default: _in_format,
    aten.roll.default: _as_parts_joined,
    aten.max_unpool2d.default: _in_format,
    aten.reflection_pad3d.default: _in_format,
    aten.replication_pad3d.default: _in_format,
    aten.reflection_pad2d_backward.default: _in_format_of_second,
    aten.reflection_pad3d_backward.default: _in_format_of_second,
    aten.replication_pad2d_backward.default: _in_format_of_second,
    aten.replication_pad3d_backward.default: _in_format_of_second,
    aten.native_batch_norm_backward.default: _first(_in_format_of_second),
    aten.batch_norm_backward.default: _first(_in_format_of_second),
    aten.native_group_norm_backward.default: _first(_in_format_of_second),
}
"""From an op's result, or results, as torch describes it, and its arguments to tensors with the strides that it has on
CPU."""

OF_OTHER_FORM: dict[OpOverload, Callable[..., Results]] = {
    aten.native_batch_norm.default: functools.partial(_batch_norm, 5),
    aten._native_batch_norm_legit.default: functools.partial(_batch_norm, 5),
    aten._native_batch_norm_legit.no_stats: functools.partial(_batch_norm, 3),
    aten._native_batch_norm_legit_functional.default: functools.partial(_batch_norm, 5),
    aten._native_batch_norm_legit_no_training.default: functools.partial(_batch_norm, None),
}
"""From an op's results, as torch describes them, and its arguments to tensors of the form that they have on CPU."""


_OWN_DESCRIPTIONS = (aten.view.default, aten._unsafe_view.default)
"""Views that torch describes by Python of its own, which gives dims of size 1 other strides than the kernel does."""


def _products_of_groups(
    x: Tensor,
    y: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,  # noqa: ARG001 - named as the kernel names it
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows are padded to a multiple of 16 bytes."""
    dtype = out_dtype or x.dtype
    of_groups = offs.shape if offs is not None and x.dim() == y.dim() == 2 else x.shape[:1] if x.dim() == 3 else ()
    batch = of_groups if x.dim() == y.dim() else ()
    rows, columns = x.shape[-2], y.shape[-1]
    per_row = 16 // dtype.itemsize
    padded = -(-columns // per_row) * per_row
    return x.new_empty_strided((*batch, rows, columns), (rows * padded, padded, 1)[-len(batch) - 2 :], dtype=dtype)


_TOO_STRICT: dict[OpOverload, Callable[..., Tensor]] = {aten._grouped_mm.default: _products_of_groups}
"""Ops whose descriptions refuse what kernels compute: other types than bfloat16, and rows of any length."""


@contextlib.contextmanager
def right_views() -> Iterator[None]:
    """Let views have the strides that they have where they are computed, also of dims of size 1; for this thread.

    And let what kernels compute be described at all.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(function_replaced(fake_impls.dispatch_to_op_implementations_dict, _unless_own))
        stack.enter_context(function_replaced(FakeTensorMode._dispatch_impl, elementwise.described))
        for op in _OWN_DESCRIPTIONS:
            kernels = {key: kernel for key, kernel in op.py_kernels.items() if key is not DispatchKey.Meta}
            stack.enter_context(python_kernels(op, kernels))
        for op, description in _TOO_STRICT.items():
            stack.enter_context(python_kernels(op, op.py_kernels | {DispatchKey.Meta: description}))
        yield


def _unless_own(original: Callable[..., Any], mode: Any, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if op in _OWN_DESCRIPTIONS else original(mode, op, *args, **kwargs)


def _statistics_on_cuda(results: tuple[Tensor, ...], x: Tensor, *args: Any) -> Results:
    """Running statistics keep their type; what is saved of the batch is more precise."""
    running = [y for y in args[2:4] if isinstance(y, Tensor)]
    new = (made.new_empty(old.shape, dtype=old.dtype) for made, old in zip(results[3:], running, strict=True))
    return torch.empty_like(x), *results[1:3], *new


def _batch_norm_backward_on_cuda(results: Results, *args: Any) -> Results:
    """In training channels last stay so."""
    first, x, training = results[0], args[1], args[7]
    if first is None:
        return results
    return (_in_format(first, x) if training else _contiguous(first)), *results[1:]


ON_CUDA: dict[OpOverload, Callable[..., Results]] = {
    aten._native_batch_norm_legit_functional.default: _statistics_on_cuda,
    aten.native_batch_norm_backward.default: _batch_norm_backward_on_cuda,
}
"""From an op's results, as torch describes them, and its arguments to tensors of the form that they have on CUDA."""


@contextlib.contextmanager
def right_forms_on_cuda() -> Iterator[None]:
    """Let the descriptions of ops on CUDA be right, for this thread."""
    with _described_by(ON_CUDA, "on CUDA"):
        yield


@contextlib.contextmanager
def right_strides() -> Iterator[None]:
    """Let the descriptions of these ops be right, for this thread."""
    rules = {op: functools.partial(_restrided, rule) for op, rule in LAID_OUT_LIKE.items()} | OF_OTHER_FORM
    with _described_by(rules, "with right strides"):
        yield


@contextlib.contextmanager
def _described_by(rules: Mapping[OpOverload, Callable[..., Any]], kind: str) -> Iterator[None]:
    longer_ways = {op: form for op, form in _decomp.decomposition_table.items() if op not in rules}
    with contextlib.ExitStack() as stack:
        stack.enter_context(descriptions_apart(kind))
        stack.enter_context(right_views())
        stack.enter_context(attribute_replaced(_decomp, "decomposition_table", longer_ways))
        for op, rule in rules.items():
            description = functools.partial(_corrected, op.py_kernels[DispatchKey.Meta], rule)
            stack.enter_context(python_kernels(op, op.py_kernels | {DispatchKey.Meta: description}))
        yield


def _corrected(description: Callable[..., Any], rule: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return rule(description(*args, **kwargs), *args)


def _restrided(rule: Callable[..., Any], described: Any, *args: Any) -> Any:
    right = rule(described, *args)
    return tuple(map(_with_strides, described, right)) if isinstance(right, tuple) else _with_strides(described, right)


def _with_strides(x: Tensor | None, of: Tensor | None) -> Tensor | None:
    return x if x is None or of is None else x.new_empty_strided(x.shape, of.stride())
