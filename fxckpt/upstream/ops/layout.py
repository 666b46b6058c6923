"""Layouts of tangents: a backward traced for a transposed or expanded tangent computes what eager computes from one."""

from __future__ import annotations

import torch

from fxckpt.upstream.ops.library import LIBRARY

LIBRARY.define("laid_out(Tensor x, SymInt[] stride) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _laid_out(x: torch.Tensor, stride: list[int]) -> torch.Tensor:
    return x.new_empty_strided(x.shape, stride)


LIBRARY.impl("laid_out", _laid_out, "CompositeExplicitAutograd")

LAID_OUT = torch.ops.fxckpt.laid_out.default
"""Marks, while a graph is traced, a tangent that will arrive with these strides; no emitted graph contains it."""


def layout_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions with more than one element; 0 for the others."""
    return tuple(0 if size <= 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
