"""What nobody needs is not computed."""

from __future__ import annotations

from torch import fx

from fxckpt.capture.nodes import has_effects


def drop_dead(graph: fx.Graph) -> None:
    """Erase nodes that nobody reads and that have no effects."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not has_effects(node):
            graph.erase_node(node)
