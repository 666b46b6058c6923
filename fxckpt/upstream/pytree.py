"""Nested values as torch sees them: the functions on its pytrees that are used here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import SUPPORTED_NODES, is_namedtuple_instance, tree_leaves, tree_map, tree_map_only

__all__ = ["NodeKind", "is_namedtuple_instance", "node_kind", "tensors_in", "tree_leaves", "tree_map", "tree_map_only"]


class NodeKind(NamedTuple):
    """How values of a registered type are taken apart into children and a context, and put together again."""

    flatten: Callable[[Any], tuple[list[Any], Any]]
    unflatten: Callable[[list[Any], Any], Any]


def node_kind(kind: type) -> NodeKind | None:
    """What is registered for a type; None if nothing is."""
    found = SUPPORTED_NODES.get(kind)
    return None if found is None else NodeKind(found.flatten_fn, found.unflatten_fn)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a nested value."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
