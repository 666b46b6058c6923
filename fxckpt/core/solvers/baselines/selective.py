"""Selective checkpointing: keep what is costly to compute, recompute the rest.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), arXiv:2205.05198, keep all
but attention's inside; the rule here is the one that frameworks ship today: keep the results of matrix products,
convolutions and attention.
"""

from __future__ import annotations

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.keep import schedule_keeping


def selective(graph: Graph, budget_bytes: int) -> Schedule:  # noqa: ARG001 - a solver takes a budget
    """Keep what ops with FLOPs write; recompute everything else."""
    forward = graph.ops[: graph.forward_count]
    return schedule_keeping(graph, {s for op in forward if op.flops > 0 for s in op.writes})
