"""Trace torch's own kernels where torch would trace a rewritten form of them.

While AOTAutograd traces, Python implementations registered for a few composite ops take the place of the C++ kernels.
For compilers they are equivalent; bit for bit they are not (interpolation, recurrent layers). They are put aside for
the duration of a capture, and layers that ask whether they are traced are told no.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._C import DispatchKey
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.nn.modules import activation

from fxckpt.upstream.absent_gpu import placed_on
from fxckpt.upstream.operators import OpOverload, python_kernels
from fxckpt.upstream.ops import cudnn_rnn
from fxckpt.upstream.ops.batch_norm import CUDNN_BATCH_NORM, cudnn_batch_norm
from fxckpt.upstream.patching import attribute_replaced, function_replaced

aten = torch.ops.aten

_REWRITTEN = (
    "upsample_",
    "_upsample_",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "multi_margin_loss",
    "multilabel_margin",
    "hardshrink",
    "softshrink",
)
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


@contextlib.contextmanager
def own_kernels() -> Iterator[None]:
    """What is traced within calls torch's own kernels."""
    with _without_python_forms(), _fused_layers(), _changes_as_in_eager():
        yield


@contextlib.contextmanager
def kernels_on_cuda() -> Iterator[None]:
    """Recurrent layers on CUDA call cuDNN's kernels, whose results are described."""
    described: dict[OpOverload, Callable[..., Any]] = {
        cudnn_rnn.KERNEL: cudnn_rnn.describe,
        cudnn_rnn.KERNEL_BACKWARD: cudnn_rnn.describe_backward,
        aten._thnn_fused_gru_cell.default: _gru_cell,
        aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    }
    with contextlib.ExitStack() as stack:
        for op, describe in described.items():
            stack.enter_context(python_kernels(op, op.py_kernels | {DispatchKey.Meta: describe}))
        for kind in cudnn_rnn.MODES:
            op = getattr(aten, kind).input
            layer = functools.partial(_by_cudnn, op, functools.partial(cudnn_rnn.layer, kind))
            stack.enter_context(python_kernels(op, op.py_kernels | dict.fromkeys(_KEYS, layer)))
        # it looks for weights that don't lie in one piece, and moves them
        stack.enter_context(function_replaced(nn.RNNBase.flatten_parameters, lambda *_: None))
        yield


def _gru_cell(gates: torch.Tensor, _: torch.Tensor, hx: torch.Tensor, *__: Any) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(hx), gates.new_empty(hx.shape[0], hx.shape[1] * 5)


def _gru_cell_backward(gradient: torch.Tensor, _: torch.Tensor, biased: bool) -> tuple[torch.Tensor | None, ...]:
    batch, size = gradient.shape
    gates = [gradient.new_empty(batch, 3 * size) for _ in range(2)]
    biases = [gradient.new_empty(3 * size) if biased else None for _ in range(2)]
    return *gates, torch.empty_like(gradient), *biases


def _by_cudnn(op: OpOverload, layer: Callable[..., Any], x: torch.Tensor, *args: Any) -> Any:
    if placed_on(x).type == "cuda" and torch.backends.cudnn.enabled:
        return layer(x, *args)
    return op._op_dk(DispatchKey.CompositeImplicitAutograd, x, *args)


@contextlib.contextmanager
def _without_python_forms() -> Iterator[None]:
    """Put the Python implementations aside."""
    with contextlib.ExitStack() as stack:
        for overload in (*_rewritten_overloads(), CUDNN_BATCH_NORM):
            if not overload.py_kernels.keys().isdisjoint(_KEYS):
                kernels = {key: kernel for key, kernel in overload.py_kernels.items() if key not in _KEYS}
                stack.enter_context(python_kernels(overload, kernels))
        kernels = aten.dropout.default.py_kernels | dict.fromkeys(_KEYS, _dropout)
        stack.enter_context(python_kernels(aten.dropout.default, kernels))
        yield


@contextlib.contextmanager
def _fused_layers() -> Iterator[None]:
    """Transformer layers call the kernels that they call in eager torch.

    Where no gradients are wanted (a frozen encoder in eval mode) these are fused ones, which give other bits. The
    layers ask whether they are traced, and then call others.
    """
    with (
        attribute_replaced(torch.overrides, "has_torch_function", _is_overridden),
        function_replaced(activation._is_make_fx_tracing, lambda _: False),
        function_replaced(nn.TransformerEncoder.forward, _encode),
    ):
        yield


def _is_overridden(given: Iterable[Any]) -> bool:
    """What `has_torch_function` answers, but for the modes in which models are captured.

    Under autocast fused kernels would cast inside, which a captured one does not: layers should avoid them.
    """
    off = torch._C._disabled_torch_function_impl
    kinds = {type(x) for x in given}
    casts = torch.is_autocast_enabled("cpu") and any(issubclass(kind, torch.Tensor) for kind in kinds)
    return casts or any(getattr(kind, "__torch_function__", off) is not off for kind in kinds - {torch.Tensor})


def _encode(
    forward: Callable[..., torch.Tensor],
    encoder: nn.TransformerEncoder,
    src: torch.Tensor,
    mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,
) -> torch.Tensor:
    refuse_nested(encoder, src, mask, src_key_padding_mask)
    return forward(encoder, src, mask, src_key_padding_mask, is_causal)


def refuse_nested(
    encoder: nn.TransformerEncoder,
    src: torch.Tensor,
    mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,  # noqa: ARG001 (called as the encoder is)
) -> None:
    """Raise an error where an encoder would use nested tensors, which only eager torch has.

    Raises:
        NotImplementedError: it would.
    """
    first = encoder.layers[0]
    is_trained = first.training or any(x.requires_grad for x in (src, *first.parameters()))
    if encoder.use_nested_tensor and src_key_padding_mask is not None and mask is None and not is_trained:
        raise NotImplementedError(
            "a frozen nn.TransformerEncoder in eval mode leaves padding out where the mask allows it, by nested "
            "tensors, which can't be captured. Give it enable_nested_tensor=False"
        )


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """One op, and nothing where nothing is dropped: torch would copy, and changes in place would go to the copy."""
    return aten.native_dropout(x, p, train)[0] if train and p != 0 else x


@contextlib.contextmanager
def _changes_as_in_eager() -> Iterator[None]:
    """Ops that change a tensor leave in it, bit for bit, what they leave in eager.

    Traced, `masked_fill_` and `bernoulli_` become ops that lay out values anew that are not contiguous. Gradients of
    `maximum` are made with the first: sums over them would be made in another order. The second draws in the order of
    memory (alpha dropout does, in memory like its input's). And what is written to an `expand`ed tensor would reach the
    tensor behind it as a difference, with a rounding error.
    """
    original = FunctionalTensorMode.__torch_dispatch__

    def dispatch(mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is aten.expand.default and _expands_nothing(args[0], args[1]):
            with mode:
                return _with_dims(args[0], len(args[1]))
        if func is CUDNN_BATCH_NORM:
            with mode:
                return cudnn_batch_norm(*args, **(kwargs or {}))
        filled = _FILLS.get(func)
        if filled is None or args[0].is_contiguous():
            return original(mode, func, types, args, kwargs)
        with mode:
            return args[0].copy_(filled(*args, **(kwargs or {})))

    with attribute_replaced(FunctionalTensorMode, "__torch_dispatch__", dispatch):
        yield


def _expands_nothing(x: torch.Tensor, shape: Sequence[int]) -> bool:
    """Whether each element has one place in the result: else it can't be written to in eager either."""
    wanted = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    return all(size in (-1, own) for size, own in zip(shape, wanted, strict=True))


def _with_dims(x: torch.Tensor, dims: int) -> torch.Tensor:
    """The tensor with ones before its shape, laid out as `expand` does."""
    if x.dim() == dims:
        return aten.alias(x)  # type: ignore[no-any-return]
    while x.dim() < dims:
        x = x.unsqueeze(0)
    return x


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    return torch.where(mask, x.new_full((), value), x)


def _bernoulli(x: torch.Tensor, p: float = 0.5, **options: Any) -> torch.Tensor:
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    drawn: torch.Tensor = aten.bernoulli.p(x.permute(order), p, **options)
    return drawn.permute([order.index(dim) for dim in range(x.dim())])


_FILLS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.masked_fill_.Scalar: _masked_fill,
    aten.bernoulli_.float: _bernoulli,
}
"""Ops that change their first argument, and what they leave in it."""


def _rewritten_overloads() -> Iterator[Any]:
    for name in dir(torch.ops.aten):
        if name.startswith(_REWRITTEN) and not name.endswith("_cell"):
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                yield getattr(packet, overload)
