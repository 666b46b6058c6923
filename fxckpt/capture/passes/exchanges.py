"""What backward hands to autograd of an output's gradient are the parts, which autograd adds up itself."""

from __future__ import annotations

from torch import fx

from fxckpt.errors import CaptureError
from fxckpt.upstream import aot
from fxckpt.upstream.operators import ADD
from fxckpt.upstream.ops.exchange import EXCHANGE


def exchange_parts(graph: fx.Graph) -> None:
    """Where an output's whole gradient is exchanged: give the op the parts that it is the sum of.

    Autograd adds up what it has of a gradient with each part that arrives, in the order in which they do. What arrives
    first is the tangent, since whatever was computed from an output of the model came after the model.
    """
    for node in graph.nodes:
        if node.target is EXCHANGE:
            (total,), *rest = node.args
            node.args = (_parts(total), *rest)


def _parts(total: fx.Node) -> list[fx.Node]:
    parts: list[fx.Node] = []
    node = total
    while True:
        tangent = _behind_views(node)
        if tangent is not None:
            return [tangent, *reversed(parts)]
        if node.target is not ADD:
            raise CaptureError(
                f"the gradient of an output that another output is computed from ends in {node.name}, where autograd "
                "would add up what comes from each. Use fxckpt.plain(model) for what needs this gradient"
            )
        node, part = node.args  # type: ignore[assignment]
        parts.append(part)  # type: ignore[arg-type]


def _behind_views(node: fx.Node) -> fx.Node | None:
    """The tangent that a node is, or is a view of in the same form."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    is_tangent = node.op == "placeholder" and isinstance(node.meta["desc"], aot.TangentAOTInput)
    return node if is_tangent else None
