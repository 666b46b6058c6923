"""Views that are the same are made once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import has_effects, value
from fxckpt.upstream.tensors import storage_key


def merge_views(graph: fx.Graph) -> None:
    """Of several nodes that are the same view of the same storage, keep the first."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        made = value(node)
        nobody_gives = node.op == "placeholder" and not node.users  # such a tangent shares its output's memory
        if node.op == "output" or nobody_gives or not isinstance(made, torch.Tensor):
            continue
        same = first.setdefault(_form(made), node)
        if same is not node and node.op == "call_function" and not has_effects(node):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors with the same elements in the same memory."""
    place = storage_key(tensor), tensor.size(), tensor.stride(), tensor.storage_offset()
    return *place, tensor.dtype, tensor.is_conj(), tensor.is_neg()
