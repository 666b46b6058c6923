"""Trace torch's own kernels where torch would trace a rewritten form of them.

While AOTAutograd traces, Python implementations registered for a few composite ops take the place of the C++ kernels.
For compilers they are equivalent; bit for bit they are not (interpolation, recurrent layers). They are put aside for
the duration of a capture. So are two descriptions of kernels that are wrong about the layout of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import DispatchKey
from torch._decomp import decomposition_table

aten = torch.ops.aten

_LIKE_PRODUCTS = (aten.native_dropout_backward.default, aten.hardswish_backward.default)
"""Elementwise kernels whose results are laid out as the product of their first two arguments."""

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
    """Put Python implementations and wrong descriptions aside, and back."""
    aside: list[tuple[Any, DispatchKey, Any]] = []
    described: dict[Any, Any] = {overload: decomposition_table.pop(overload) for overload in _LIKE_PRODUCTS}
    for overload in _LIKE_PRODUCTS:
        aside.append((overload, DispatchKey.Meta, overload.py_kernels[DispatchKey.Meta]))
        overload.py_kernels[DispatchKey.Meta] = _product
        overload._dispatch_cache.clear()
    for overload in _rewritten_overloads():
        for key in _KEYS:
            if key in overload.py_kernels:
                aside.append((overload, key, overload.py_kernels.pop(key)))
        overload._dispatch_cache.clear()
    try:
        yield
    finally:
        decomposition_table.update(described)
        for overload, key, kernel in aside:
            overload.py_kernels[key] = kernel
            overload._dispatch_cache.clear()


def _product(x: torch.Tensor, y: torch.Tensor, *_: Any) -> torch.Tensor:
    return x * y


def _rewritten_overloads() -> Iterator[Any]:
    for name in dir(torch.ops.aten):
        if name.startswith(_REWRITTEN):
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                yield getattr(packet, overload)
