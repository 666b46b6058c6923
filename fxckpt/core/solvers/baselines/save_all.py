"""No checkpointing: every op once."""

from __future__ import annotations

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain


def save_all(graph: Graph, budget_bytes: int) -> Schedule:  # noqa: ARG001 - a solver takes a budget
    """The plain step, which keeps all that backward reads."""
    return plain(graph)
