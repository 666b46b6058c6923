"""Which ops Inductor computes within a kernel, together with what reads them or what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxckpt.upstream.operators import changes_arguments, is_operator

__all__ = ["is_fusible", "is_pointwise", "is_reduction"]

aten, prims = torch.ops.aten, torch.ops.prims

_FROM_SEEDS = frozenset(("prims::inductor_lookup_seed", "prims::inductor_random", "prims::inductor_randint"))
"""Random numbers that are computed from a seed; these ops are there when Inductor is."""

_POINTWISE: frozenset[Any] = frozenset(
    (
        prims.iota.default,
        aten._to_copy.default,
        aten.full.default,
        aten.constant_pad_nd.default,
    )
)
"""Elementwise ops that don't have torch's tag for them."""

_INDEXED: frozenset[Any] = frozenset(
    (aten.gather.default, aten.index.Tensor, aten.embedding.default, aten.slice_scatter.default, aten.cat.default)
)
"""Ops whose elements are each an element of an operand: computed within a kernel, too."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the op's one result is computed from one of each operand: it may be made where read."""
    target = node.target
    if not is_operator(target) or not isinstance(node.meta.get("val"), torch.Tensor) or changes_arguments(target):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target in _POINTWISE or target.name() in _FROM_SEEDS


def is_reduction(node: fx.Node) -> bool:
    """Whether the op sums up, or the like: what it reads may be computed within its kernel."""
    return is_operator(node.target) and torch.Tag.reduction in node.target.tags


def is_fusible(node: fx.Node) -> bool:
    """Whether the op runs within a kernel of Inductor's; all others call a library."""
    return is_pointwise(node) or is_reduction(node) or node.target in _INDEXED
