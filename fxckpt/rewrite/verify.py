"""Check emitted graphs against the schedule they were made from, by reading the graphs alone.

What is checked, after every rewrite: the ops stand in the schedule's order, each calls what the captured op calls on
the values that the captured op reads, in their most recent copies; and every copy of every storage lives exactly as
long as the simulation says, so that the predicted peak is that of the code which runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import is_selection
from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.simulate import Timeline
from fxckpt.errors import VerificationError
from fxckpt.profile.build import Profile
from fxckpt.rewrite.backends import Executable
from fxckpt.rewrite.backends.python.in_place import plain_call
from fxckpt.rewrite.backends.python.together import apart
from fxckpt.rewrite.emitted import Emitted, deliver
from fxckpt.upstream import pytree
from fxckpt.upstream.ops.rng import run_with_rng_state

_DETACH = torch.ops.aten.detach.default
"""Makes a tensor of its own of one that is handed out already."""


def verify(profile: Profile, timeline: Timeline, executable: Executable) -> None:
    """Check that the graphs which an executable runs are exactly a simulated schedule.

    Raises:
        VerificationError: they are not; the message names the first node that differs. This is a defect of fxckpt.
    """
    emitted = executable.emitted
    _check_order(profile, timeline, emitted)
    _check_nothing_else_works(profile, emitted)
    _check_arguments(profile, emitted)
    _check_lifetimes(profile, timeline, emitted)
    _check_handed_out(profile, emitted)


def _nodes(emitted: Emitted) -> list[fx.Node]:
    return list(chain(emitted.forward.nodes, emitted.backward.nodes))


def _check_order(profile: Profile, timeline: Timeline, emitted: Emitted) -> None:
    schedule = timeline.schedule
    for graph, steps in (
        (emitted.forward, range(schedule.forward_steps)),
        (emitted.backward, range(schedule.forward_steps, len(schedule))),
    ):
        found = [node for node in graph.nodes if "fxckpt_step" in node.meta]
        expected = [(step, node) for step in steps for node in profile.parts[schedule.order[step]]]
        if [node.meta["fxckpt_step"] for node in found] != [step for step, _ in expected]:
            raise VerificationError("the emitted ops are not the steps of the schedule, in their order")
        for have, (_, want) in zip(found, expected, strict=True):
            if have.meta["fxckpt_node"] is not want:
                raise VerificationError(f"{have.name} is emitted where {want.name} belongs")


def _check_nothing_else_works(profile: Profile, emitted: Emitted) -> None:
    """What is no step only makes views, picks results, keeps what repeats need, or hands over."""
    for node in _nodes(emitted):
        if node.op != "call_function" or "fxckpt_step" in node.meta or "fxckpt_replay" in node.meta:
            continue
        captured = node.meta.get("fxckpt_node")
        if captured is None and node.target not in (deliver, _DETACH):
            raise VerificationError(f"{node.name} is neither a step nor made of the captured graph")
        if captured in profile.map.writes and not is_selection(captured):
            raise VerificationError(f"{node.name} computes {captured.name} beside the steps of the schedule")


def _check_handed_out(profile: Profile, emitted: Emitted) -> None:
    """Forward returns updates, outputs and what is saved; each stage delivers the gradients of its inputs."""
    roles = profile.joint.roles
    results = [i.update for i in roles.inputs if i.update is not None] + [o.node for o in roles.outputs]
    returned: Any = emitted.forward.output_node().args[0]
    found = [_behind_detach(node) for node in returned]
    expected = [*results, *(_stands_for(node) for node in emitted.saved)]
    for want, have in zip_longest(expected, [_stands_for(node) for node in found]):
        if want != have:
            raise VerificationError(f"forward returns {have} where {want} belongs")
    delivered = [node for node in emitted.backward.nodes if node.target is deliver]
    if len(delivered) != len(emitted.stages):
        raise VerificationError(f"backward delivers gradients {len(delivered)} times, in {len(emitted.stages)} stages")
    for node, stage in zip(delivered, emitted.stages, strict=True):
        gradients = [roles.inputs[index].gradient for index in stage.inputs]
        for want, have in zip_longest(gradients, node.args):
            if want is not (have.meta.get("fxckpt_node") if isinstance(have, fx.Node) else have):
                raise VerificationError(f"{have} is delivered where the gradient {want} belongs")


def _behind_detach(node: fx.Node) -> fx.Node:
    (source,) = node.all_input_nodes if node.target is _DETACH and "fxckpt_node" not in node.meta else (node,)
    return source


def _stands_for(node: fx.Node) -> Any:
    """The captured node, or the name of the storage to be replayed, that an emitted node holds the value of."""
    return node.meta.get("fxckpt_node", node.meta.get("fxckpt_replay", node))


def _check_arguments(profile: Profile, emitted: Emitted) -> None:
    """Each emitted node calls what its captured node calls, on the same values in their latest copies."""
    behind = profile.map.behind
    latest: dict[int, int] = {}  # storage -> the emitted op (by position) that wrote its latest copy
    copy_of: dict[fx.Node, int] = {}  # emitted value -> the copy that it is in
    handed_over = dict(zip(_backward_inputs(emitted), emitted.saved, strict=False))
    for position, node in enumerate(_nodes(emitted)):
        captured = node.meta.get("fxckpt_node")
        if captured is None or node.op != "call_function":
            if node in handed_over and captured is not None:
                copy_of[node] = copy_of.get(handed_over[node], -1)  # constants have no copies
            continue
        target, args, kwargs, _ = _call(node)
        if target != captured.target:
            raise VerificationError(f"{node.name} calls {target}, but {captured.name} calls {captured.target}")
        expected = pytree.tree_leaves((captured.args, captured.kwargs))
        found = pytree.tree_leaves((args, kwargs))
        for want, have in zip_longest(expected, found):
            if not isinstance(want, fx.Node) or not isinstance(have, fx.Node):
                if want is not have and want != have:
                    raise VerificationError(f"{node.name} has the argument {have!r} where {captured.name} has {want!r}")
            elif "fxckpt_replay" not in have.meta:
                _check_value(node, want, have, latest, copy_of, behind)
            elif have.meta["fxckpt_replay"] != f"{captured.name}.{profile.map.storages[behind[want]].name}":
                raise VerificationError(f"{node.name} reads {have.name} where the old value of {want.name} belongs")
        if "fxckpt_step" in node.meta:
            for storage in profile.map.writes[captured]:
                latest[storage] = position
        if captured in behind:
            copy_of[node] = latest.get(behind[captured], -1)


def _check_value(
    node: fx.Node,
    want: fx.Node,
    have: fx.Node,
    latest: dict[int, int],
    copy_of: dict[fx.Node, int],
    behind: dict[fx.Node, int],
) -> None:
    if have.meta.get("fxckpt_node") is not want:
        raise VerificationError(f"{node.name} reads {have.name} where a value of {want.name} belongs")
    if want in behind and have.op != "placeholder" and copy_of.get(have, -1) != latest.get(behind[want], -1):
        raise VerificationError(f"{node.name} reads an old copy of {want.name}")


def _call(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """What a node calls, as captured, and the value that it writes over if it does."""
    if node.target is run_with_rng_state:
        return node.args[2], node.args[3:], node.kwargs, None
    called, args = apart(node)
    target, kwargs, over = plain_call(called, dict(node.kwargs))
    return target, args, kwargs, args[0] if over is ... else over


def _backward_inputs(emitted: Emitted) -> list[fx.Node]:
    return [node for node in emitted.backward.nodes if node.op == "placeholder"]


@dataclass
class _Copy:
    """One copy of a storage in the emitted code: from the step that writes it to the last that mentions it."""

    storage: int
    born: int
    dies: int


def _check_lifetimes(profile: Profile, timeline: Timeline, emitted: Emitted) -> None:
    """Liveness as the generated code has it (a variable dies at its last mention), against the simulation's."""
    graph, split = profile.graph, timeline.schedule.forward_steps
    copies: list[_Copy] = []
    holder: dict[fx.Node, _Copy] = {}
    overwritten: list[tuple[fx.Node, _Copy | None, int]] = []
    handed_over = dict(zip(_backward_inputs(emitted), emitted.saved, strict=False))
    step = -1
    for node in _nodes(emitted):
        step = node.meta.get("fxckpt_step", step)
        captured = node.meta.get("fxckpt_node")
        for source in node.all_input_nodes:
            if source in holder and node.op != "output":
                for copy in _in_memory_of(profile, holder[source], copies):
                    copy.dies = max(copy.dies, _step_of(node, step))
        if isinstance(over := _call(node)[3], fx.Node):
            overwritten.append((node, holder.get(over), step))
        if node in handed_over and handed_over[node] in holder:
            holder[node] = holder[handed_over[node]]
            holder[node].dies = max(holder[node].dies, split)
        elif captured is None:
            continue
        elif captured not in profile.map.behind:  # a list of views of one storage
            holders = [holder[n] for n in node.all_input_nodes if n in holder]
            if "fxckpt_step" not in node.meta and holders:
                holder[node] = holders[0]
        elif node.op == "placeholder":
            storage = profile.map.behind[captured]
            if graph.storages[storage].kind not in RESIDENT:
                holder[node] = _Copy(storage, split, split)
                copies.append(holder[node])
        else:
            viewed = next((n for n in node.all_input_nodes if _same_copy(profile, n, node, holder)), None)
            if viewed is not None:
                holder[node] = holder[viewed]
            elif graph.storages[profile.map.behind[captured]].kind not in RESIDENT:
                holder[node] = _Copy(profile.map.behind[captured], step, step)
                copies.append(holder[node])
    _compare(timeline, copies)
    _check_overwritten(graph, split, overwritten)


def _in_memory_of(profile: Profile, copy: _Copy, copies: list[_Copy]) -> Iterator[_Copy]:
    """A copy, and the latest copies of the storages that it is written over."""
    yield copy
    storage = copy.storage
    while storage in profile.map.over:
        storage = profile.map.over[storage]
        yield next(other for other in reversed(copies) if other.storage == storage)


def _check_overwritten(graph: Graph, split: int, overwritten: list[tuple[fx.Node, _Copy | None, int]]) -> None:
    """Nobody may read a value after an op wrote over it, nor may backward write over what forward saved."""
    handed_out = {*graph.outputs, *graph.updates, *graph.gradients}
    for node, copy, step in overwritten:
        if copy is None or _is_needed(graph, copy, handed_out) or copy.dies > step or _saved(copy, step, split):
            name = graph.storages[copy.storage].name if copy else "a value that is given"
            raise VerificationError(f"{node.name} writes over {name}, which is still needed")


def _is_needed(graph: Graph, copy: _Copy, handed_out: set[int]) -> bool:
    """Whether a copy is somebody else's, now or later."""
    return copy.storage in handed_out or graph.storages[copy.storage].kind == "tangent"


def _saved(copy: _Copy, step: int, split: int) -> bool:
    """Whether a step of backward looks at a copy of forward's."""
    return (copy.born < split) != (step < split)


def _step_of(node: fx.Node, step: int) -> int:
    """The step during which a node runs: views stand before the op that reads them, and belong to its step."""
    if "fxckpt_step" in node.meta or node.target is deliver:
        return step
    readers = [_step_of(user, user.meta.get("fxckpt_step", step)) for user in node.users if user.op == "call_function"]
    return max([step, *readers]) if readers else step


def _same_copy(profile: Profile, source: fx.Node, node: fx.Node, holder: dict[fx.Node, _Copy]) -> bool:
    """Whether a node is a view of a source value rather than a new allocation."""
    if source not in holder or "fxckpt_step" in node.meta:
        return False
    return holder[source].storage == profile.map.behind[node.meta["fxckpt_node"]]


def _compare(timeline: Timeline, copies: list[_Copy]) -> None:
    """Storages that are handed out live on; all others must die in the code where the simulation lets them die."""
    graph = timeline.graph
    handed_out = {*graph.outputs, *graph.updates, *graph.gradients}
    found = {(c.storage, c.born): c.dies for c in copies if c.storage not in handed_out}
    for life in timeline.lifetimes:
        key = (life.storage, life.born)
        if life.storage in handed_out or life.storage in graph.replayed or life.dies == life.born:
            continue
        if found.get(key) != life.dies:
            name = graph.storages[life.storage].name
            raise VerificationError(
                f"{name}, written in step {life.born}, dies in step {found.get(key)} of the emitted code, but the plan "
                f"says step {life.dies}"
            )
