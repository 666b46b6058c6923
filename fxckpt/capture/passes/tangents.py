"""Backward takes tangents in the layout in which they arrive."""

from __future__ import annotations

from torch import fx

from fxckpt.upstream.ops.layout import LAID_OUT


def lay_out_tangents(graph: fx.Graph) -> None:
    """Tangents that arrive in another layout than their output's are given to the graph in it."""
    for node in list(graph.nodes):
        if node.target is LAID_OUT:
            (tangent,) = node.all_input_nodes
            tangent.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(tangent)
            graph.erase_node(node)
