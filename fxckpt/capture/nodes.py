"""What a node does beside computing its outputs, and hence how it may be treated."""

from __future__ import annotations

import operator

import torch
from torch import fx

_NEVER_REPEATED_NAMESPACES = frozenset(("_c10d_functional", "c10d", "c10d_functional"))
_RANDOM_ATEN = (torch.Tag.nondeterministic_seeded,)


def is_random(node: fx.Node) -> bool:
    """Whether the op draws from the random-number generator."""
    return isinstance(node.target, torch._ops.OpOverload) and any(t in node.target.tags for t in _RANDOM_ATEN)


def has_effects(node: fx.Node) -> bool:
    """Whether the op must run even if nothing reads its outputs."""
    if is_random(node) or is_collective(node):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target._schema.is_mutable or not target._schema.returns)


def is_collective(node: fx.Node) -> bool:
    """Whether the op communicates with other processes."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _NEVER_REPEATED_NAMESPACES


def why_pinned(node: fx.Node) -> str:
    """Why the op must not be repeated, or "" if it may be."""
    target = node.target
    if is_collective(node):
        return "it communicates with other processes"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{target.name()} is opaque"
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            return "it changes its arguments"
        if not target._schema.returns:
            return "it looks at values and may raise an error"
        if torch.Tag.nondeterministic_bitwise in target.tags:
            return "it may give another result when run again"
    return ""


def is_selection(node: fx.Node) -> bool:
    """Whether the node only picks an element of a tuple or list."""
    return node.op == "call_function" and node.target is operator.getitem
