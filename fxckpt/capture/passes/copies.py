"""Needless copies are left out."""

from __future__ import annotations

import torch
from torch import fx

from fxckpt.capture.nodes import describe_again, tensors, value
from fxckpt.upstream import aot
from fxckpt.upstream.tensors import storage_key

aten = torch.ops.aten


def drop_copies(graph: fx.Graph) -> None:
    """Replace copies in the same layout, and detached tensors, by their source."""
    kept = {storage_key(value(node)) for node in graph.output_node().all_input_nodes}
    changed = {storage_key(value(node)) for node in _changed_inputs(graph)}
    views: dict[int | None, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for tensor in tensors(node):
            views.setdefault(storage_key(tensor), {})[node] = None
    for node in list(graph.nodes):
        if node.target is aten.detach.default:
            _replace_by_source(node)
        elif _is_same_layout_copy(node, kept, changed):
            others = [view for view in views[storage_key(value(node))] if view is not node]
            if all(view.target is not aten.as_strided.default for view in others):  # else it counts from another start
                _replace_by_source(node)
                describe_again(others)


def _replace_by_source(node: fx.Node) -> None:
    node.replace_all_uses_with(_source(node))
    node.graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node:
    """What is copied: the last of the inputs, since `copy` is told first what it takes the form of."""
    return node.all_input_nodes[-1]


def _changed_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Placeholders whose tensors the step changes."""
    outputs = graph.output_node()
    changed = {d.mutated_input for d in outputs.meta["desc"] if isinstance(d, aot.InputMutationAOTOutput)}
    return [node for node in graph.nodes if node.op == "placeholder" and node.meta["desc"] in changed]


def _is_same_layout_copy(node: fx.Node, kept: set[int | None], changed: set[int | None]) -> bool:
    if node.target not in (aten.clone.default, aten.copy.default):
        return False
    source, copy = value(_source(node)), value(node)
    same = all(getattr(source, what) == getattr(copy, what) for what in ("shape", "dtype", "device"))
    same = same and source.stride() == copy.stride()
    return same and storage_key(copy) not in kept and storage_key(source) not in changed
