"""Nested values as torch sees them: the functions on its pytrees that are used here."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import SUPPORTED_NODES, NodeDef, is_namedtuple_instance, tree_leaves, tree_map, tree_map_only

__all__ = ["NodeDef", "is_namedtuple_instance", "node_kind", "tensors_in", "tree_leaves", "tree_map", "tree_map_only"]


def node_kind(kind: type) -> NodeDef | None:
    """How values of a registered type are taken apart (`flatten_fn`) and put together again (`unflatten_fn`)."""
    return SUPPORTED_NODES.get(kind)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a nested value."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
