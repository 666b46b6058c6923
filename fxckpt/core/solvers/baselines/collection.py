"""Checkpoints named by the user.

The mode "collection" of Salimans and Bulatov's gradient-checkpointing package (2018).
"""

from __future__ import annotations

from collections.abc import Collection

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.keep import schedule_keeping
from fxckpt.errors import SolverError


def collection(graph: Graph, budget_bytes: int, *, keep: Collection[str]) -> Schedule:  # noqa: ARG001
    """Keep the outputs of the named modules and ops; recompute everything else.

    Args:
        graph: the training step.
        budget_bytes: not used: the names decide.
        keep: paths of modules ("blocks.3"), prefixes of such paths ("blocks"), or names of ops ("addmm_2"). Of a module
            is kept what later ops outside it read.

    Raises:
        SolverError: there is no module or forward op of a given name.
    """
    names = (keep,) if isinstance(keep, str) else keep
    kept: set[int] = set()
    for name in names:
        kept |= _outputs(graph, name)
    return schedule_keeping(graph, kept)


def _outputs(graph: Graph, name: str) -> set[int]:
    forward = graph.ops[: graph.forward_count]
    named = {s for op in forward if op.name == name for s in op.writes}
    inside = {i for i, op in enumerate(forward) if op.module == name or op.module.startswith(name + ".")}
    if not named and not inside:
        modules = sorted({op.module.split(".")[0] for op in forward if op.module})
        raise SolverError(
            f"the graph has no module and no forward op {name!r}; its outermost modules are {', '.join(modules) or '-'}"
        )
    written = {s for i in inside for s in graph.ops[i].writes}
    read_outside = {s for i, op in enumerate(forward) if i not in inside for s in op.reads}
    return named | (written & read_outside)
