"""From the chain's steps to a schedule.

What is there at each moment is known from the steps alone; whatever a step needs beyond that is recomputed. So the
schedule is valid even where the chain's picture of the graph is too simple.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers.chain.blocks import Block
from fxckpt.core.solvers.chain.chain import Backward, Drop, Keep, Step
from fxckpt.core.solvers.keep import closure, recomputing
from fxckpt.core.solvers.segments import Segments


def lower(graph: Graph, segments: Segments, blocks: Mapping[tuple[int, int], Block], steps: Iterable[Step]) -> Schedule:
    """The schedule that carries out `steps` on the blocks of a cutting."""
    always = segments.pinned | frozenset(graph.outputs)
    live = set(always)
    order: list[int] = []
    done = 0
    forward_steps: int | None = None
    for step in steps:
        if isinstance(step, Drop):
            live -= frozenset(segments.boundaries[step.index]) - always
            continue
        start, end = segments.forward_cuts[step.first], segments.forward_cuts[step.last + 1]
        if isinstance(step, Backward):
            forward_steps = len(order) if forward_steps is None else forward_steps
            back = range(segments.backward_cuts[step.last + 1], segments.backward_cuts[step.first])
            order += recomputing(graph, back, live)
            live -= {s for op in graph.ops[start:end] for s in op.writes} - always
            continue
        needed = set(segments.boundaries[step.last + 1])
        if isinstance(step, Keep):
            numbers = blocks[step.first, step.last].numbers
            needed |= {numbers[i] for i in step.choice.kept}
        order += range(done, end) if done < end else closure(graph, needed, live)
        done = max(done, end)
        live |= needed
    return Schedule(tuple(order), len(order) if forward_steps is None else forward_steps)
