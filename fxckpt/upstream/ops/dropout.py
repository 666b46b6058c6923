"""Dropout on CPU as eager torch computes it, with a mask of one byte an element.

Traced on CPU, dropout becomes `aten.native_dropout`, which scales by 1/(1-p) in double precision. Eager torch
multiplies by a noise tensor that was rounded to the tensor's own type first; in bfloat16, or at p = 0.15 in float32,
the results differ in the last bit. These two ops draw the same random numbers, round as eager does, and need a byte an
element where eager saves a float.
"""

from __future__ import annotations

import functools

import torch

from fxckpt.upstream.ops.library import LIBRARY

LIBRARY.define(
    "dropout(Tensor x, float p, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
LIBRARY.define("dropout_backward(Tensor grad, Tensor mask, float scale) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def dropout(x: torch.Tensor, p: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward: the result, and which elements are kept."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    if p < 1:  # else eager draws nothing
        mask.bernoulli_(1 - p)
    return _masked(x, mask, scale), mask


def dropout_backward(grad: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Backward: the gradient of the input."""
    return _masked(grad, mask, scale)


def _masked(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    if x.stride() != mask.stride():  # the result is laid out by both
        return x.mul(mask).mul_(scale)
    return mask.to(x.dtype).mul_(x).mul_(scale)  # the same, without a copy of the mask beside the result


LIBRARY.impl("dropout", dropout, "CompositeExplicitAutograd")
LIBRARY.impl("dropout_backward", dropout_backward, "CompositeExplicitAutograd")

DROPOUT = torch.ops.fxckpt.dropout.default
DROPOUT_BACKWARD = torch.ops.fxckpt.dropout_backward.default


@functools.cache
def eager_scale(p: float, dtype: torch.dtype) -> float:
    """What eager torch multiplies kept elements by: 1/(1-p), rounded as a tensor of this type."""
    if p >= 1:
        return 0.0
    return float(torch.ones((), dtype=dtype).div_(1 - p).item())
