"""A backward for other outputs than a forward was planned for.

Backward turned out to start from other outputs than expected (an output that is rarely used, or one loss of several).
The
forward has run, and its saved values are what there is: this backward remakes whatever else it needs from them and from
the inputs, each value once. Peak memory is not planned for; the next forward is.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxckpt.capture.effects import is_selection
from fxckpt.errors import RuntimeContractError
from fxckpt.graph import RESIDENT, Graph
from fxckpt.profile.build import Profile
from fxckpt.rewrite.codegen import compile_boxed
from fxckpt.rewrite.split import Emitted, Writer
from fxckpt.schedule import Schedule


def bridge(ran: Emitted, second: Profile) -> Emitted:
    """Continue from the forward of `ran` with the backward of `second`, a capture of the same step from other outputs.

    Raises:
        RuntimeContractError: the two captures don't have the same forward.
    """
    nodes = {node.name: node for node in second.joint.module.graph.nodes}
    replayed = {storage.name: index for index, storage in enumerate(second.graph.storages)}
    saved: dict[fx.Node, fx.Node] = {}  # saved node of the forward that ran -> the captured node in `second`
    states: dict[fx.Node, int] = {}
    for source in ran.saved:
        if "fxckpt_node" in source.meta:
            saved[source] = _counterpart(source.meta["fxckpt_node"], nodes)
        elif source.meta["fxckpt_replay"] in replayed:
            states[source] = replayed[source.meta["fxckpt_replay"]]
    have = {second.map.behind[node] for node in saved.values() if _is_whole(second, node)}
    schedule = _schedule(second.graph, have)
    writer = Writer(second, schedule, None, executed=range(second.graph.forward_count))
    placeholders = [writer.graph.placeholder(source.name) for source in ran.saved]
    for source, placeholder in zip(ran.saved, placeholders, strict=True):
        if source in saved:
            writer.place(saved[source], placeholder)
        elif source in states:
            writer.keep_replay(states[source], placeholder)
    writer.place_tangents()
    for step in range(len(schedule)):
        writer.step(step)
    for stage in ran.stages:
        writer.deliver(stage.inputs)
    given = writer.order_inputs(placeholders)
    backward = compile_boxed(writer.graph, second.joint.module, "Backward")
    return replace(ran, backward=backward, given=given, tangents=writer.tangents)


def _is_whole(profile: Profile, node: fx.Node) -> bool:
    """Whether a node is what an op wrote, from which any view can be made, rather than a view."""
    return node in profile.map.writes or (is_selection(node) and node.all_input_nodes[0] in profile.map.writes)


def _counterpart(node: fx.Node, nodes: dict[str, fx.Node]) -> fx.Node:
    found = nodes.get(node.name)
    if found is None or found.target != node.target:
        raise RuntimeContractError(
            "backward started from other outputs than expected, and capturing the model again gave another forward: "
            "its "
            "forward is not the same each time. Make it deterministic, or differentiate the same outputs every step"
        )
    return found


def _schedule(graph: Graph, have: set[int]) -> Schedule:
    """Backward in its order; before each op the forward ops that it lacks, from what is saved."""
    available = set(have) | {i for i, s in enumerate(graph.storages) if s.kind in RESIDENT or s.kind == "tangent"}
    order: list[int] = []

    def need(storage: int) -> None:
        pending = [(storage, False)]
        while pending:
            wanted, ready = pending.pop()
            if wanted in available:
                continue
            producer = graph.producer[wanted]
            if ready:
                order.append(producer)
                available.update(graph.ops[producer].writes)
            else:
                pending.append((wanted, True))
                pending += [(source, False) for source in graph.ops[producer].reads]

    for index in range(graph.forward_count, len(graph.ops)):
        for storage in graph.ops[index].reads:
            need(storage)
        order.append(index)
        available.update(graph.ops[index].writes)
    return Schedule(tuple(order), 0)
