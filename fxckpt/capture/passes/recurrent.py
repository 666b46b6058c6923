"""Recurrent kernels keep what backward needs."""

from __future__ import annotations

from torch import fx

from fxckpt.upstream.ops.recurrent import RECURRENT


def own_recurrent_kernels(graph: fx.Graph) -> None:
    """Call our own ops instead of torch's, which keep it only where gradients are enabled."""
    for node in graph.nodes:
        node.target = RECURRENT.get(node.target, node.target)
