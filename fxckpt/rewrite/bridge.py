"""A backward for other outputs than a forward was planned for.

Backward turned out to start from other outputs than expected (an output that is rarely used, or one loss of several).
The forward has run, and its saved values are what there is: this backward remakes whatever else it needs from them and
from the inputs, each value once. Peak memory is not planned for; the next forward is.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxckpt.capture.nodes import is_selection
from fxckpt.core.graph import RESIDENT
from fxckpt.core.schedule import Schedule
from fxckpt.errors import RuntimeContractError
from fxckpt.profile.build import Profile, inlined_into
from fxckpt.rewrite.emitted import Emitted
from fxckpt.rewrite.writer import Writer


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
            counterpart = _counterpart(source.meta["fxckpt_node"], nodes)
            if counterpart is not None:
                saved[source] = counterpart
        elif source.meta["fxckpt_replay"] in replayed:
            states[source] = replayed[source.meta["fxckpt_replay"]]
    schedule = _schedule(second, frozenset(saved.values()))
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
    return replace(ran, backward=writer.graph, given=given, tangents=writer.tangents)


def _counterpart(node: fx.Node, nodes: dict[str, fx.Node]) -> fx.Node | None:
    """The same forward node in the other capture; None if nobody reads it there."""
    found = nodes.get(node.name)
    if found is not None and found.target != node.target:
        raise RuntimeContractError(
            "backward started from other outputs than expected, and capturing the model again gave another forward: "
            "it is not the same each time. Make it deterministic, or differentiate the same outputs every step"
        )
    return found


def _schedule(profile: Profile, saved: frozenset[fx.Node]) -> Schedule:
    """Backward in its order; before each op the forward ops that it lacks, from what is saved.

    A saved view serves those who read it or views of it; who reads anything else of its storage needs the storage anew.
    """
    graph = profile.graph
    written = {i for i, s in enumerate(graph.storages) if s.kind in RESIDENT or s.kind == "tangent"}
    order: list[int] = []

    def is_there(node: fx.Node) -> bool:
        if node in saved or profile.map.behind.get(node) in written:
            return True
        is_view = node.op == "call_function" and node not in profile.map.writes and bool(node.all_input_nodes)
        picks = is_selection(node) and node.all_input_nodes[0] in profile.map.writes
        return is_view and not picks and all(map(is_there, node.all_input_nodes))

    def run(index: int) -> None:
        pending = [(index, False)]
        while pending:
            op, ready = pending.pop()
            if ready:
                order.append(op)
                written.update(graph.ops[op].writes)
                continue
            pending.append((op, True))
            parts = (n for node in profile.parts[op] for n in (node, *inlined_into(node, profile.map)))
            inputs = dict.fromkeys(n for part in parts for n in part.all_input_nodes)
            lacking = [n for n in inputs if n in profile.map.behind and not is_there(n)]
            producers = dict.fromkeys(graph.producer[profile.map.behind[node]] for node in lacking)
            pending += [(producer, False) for producer in producers if producer != op]

    for index in range(graph.forward_count, len(graph.ops)):
        run(index)
    return Schedule(tuple(dict.fromkeys(order)), 0)  # asked for by several, an op stands where it first runs
