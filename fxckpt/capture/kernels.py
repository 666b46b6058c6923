"""Trace torch's own kernels where torch would trace a rewritten form of them.

While AOTAutograd traces, Python implementations registered for a few composite ops take the place of the C++ kernels.
For compilers they are equivalent; bit for bit they are not (interpolation, recurrent layers). They are put aside for
the duration of a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._C import DispatchKey
from torch._subclasses.functional_tensor import FunctionalTensorMode

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
)
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


@contextlib.contextmanager
def own_kernels() -> Iterator[None]:
    """Put the Python implementations aside, and back."""
    aside: list[tuple[Any, DispatchKey, Any]] = []
    for overload in (*_rewritten_overloads(), aten.dropout.default):
        for key in _KEYS:
            if key in overload.py_kernels:
                aside.append((overload, key, overload.py_kernels.pop(key)))
        overload._dispatch_cache.clear()
    for key in _KEYS:
        aten.dropout.default.py_kernels[key] = _dropout
    try:
        yield
    finally:
        for overload, key, kernel in aside:
            overload.py_kernels[key] = kernel
            overload._dispatch_cache.clear()


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """One op, and nothing where nothing is dropped: torch would copy, and changes in place would go to the copy."""
    return aten.native_dropout(x, p, train)[0] if train and p != 0 else x


@contextlib.contextmanager
def fills_keep_their_layout() -> Iterator[None]:
    """Traced, `masked_fill_` becomes `masked_fill`, which lays out values anew that are not contiguous.

    Gradients of `maximum` are made with it. Sums over them would be made in another order.
    """
    original = FunctionalTensorMode.__torch_dispatch__

    def dispatch(mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not aten.masked_fill_.Scalar or args[0].is_contiguous():
            return original(mode, func, types, args, kwargs)
        x, mask, value = args
        with mode:
            return x.copy_(torch.where(mask, x.new_full((), value), x))

    with mock.patch.object(FunctionalTensorMode, "__torch_dispatch__", dispatch):
        yield


def _rewritten_overloads() -> Iterator[Any]:
    for name in dir(torch.ops.aten):
        if name.startswith(_REWRITTEN):
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                yield getattr(packet, overload)
