"""Results that nobody asked for are not there."""

from __future__ import annotations

from torch import fx

from fxckpt.capture.nodes import value
from fxckpt.upstream.operators import argument_names, is_operator


def leave_out_masked(graph: fx.Graph) -> None:
    """Results that an op is told not to compute are not there, though torch may describe them (batch norm's do)."""
    for node in graph.nodes:
        names = argument_names(node.target) if is_operator(node.target) else ()
        for mask in [node.args[n] for n in range(len(node.args)) if names[n : n + 1] == ("output_mask",)]:
            results = zip(value(node), mask, strict=True)
            node.meta["val"] = tuple(result if wanted else None for result, wanted in results)
