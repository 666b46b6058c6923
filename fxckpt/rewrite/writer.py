"""Write the nodes of a forward or backward graph, step by step of a schedule.

A step of the schedule becomes the nodes that its op stands for; views are made just before their first reader, and
again where needed after that. What is computed within an op is made anew for each step that reads it. Values that
backward needs become outputs of the forward graph and inputs of the backward
graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import fx

from fxckpt.capture.nodes import is_random, is_selection
from fxckpt.core.schedule import Schedule
from fxckpt.errors import InvalidScheduleError
from fxckpt.profile.build import Profile
from fxckpt.rewrite.emitted import deliver
from fxckpt.upstream import pytree
from fxckpt.upstream.ops.rng import rng_state, run_with_rng_state

aten = torch.ops.aten


class Writer:
    """Writes one of the two graphs. `value(node)` is the current value of a captured node in it, made if need be."""

    def __init__(
        self, profile: Profile, schedule: Schedule, before: Writer | None, *, executed: Iterable[int] = ()
    ) -> None:
        """`before` has written the forward graph; ops in `executed` have run elsewhere, so they are repeated here."""
        self.graph = fx.Graph()
        self.saved: list[fx.Node] = []  # nodes of the forward graph whose values are read here
        self.inputs: dict[fx.Node, fx.Node] = {}  # node of the forward graph, or captured input -> placeholder
        outputs = profile.joint.roles.outputs
        self.tangents = tuple(i for i, output in enumerate(outputs) if output.tangent is not None)
        self._profile, self._schedule, self._before = profile, schedule, before
        self._values: dict[fx.Node, fx.Node] = {}
        self._inlined: list[fx.Node] = []  # that have a value in the present step
        self._nodes_behind: dict[int, list[fx.Node]] = {}
        for node in profile.joint.module.graph.nodes:
            for storage in _storages_viewed(profile, node):
                self._nodes_behind.setdefault(storage, []).append(node)
        self._executed: set[int] = before._executed if before else set(executed)
        self._replayed: dict[int, fx.Node] = {}  # replay storage -> emitted node in this graph
        self._repeated = schedule.repeats()

    # values

    def place(self, node: fx.Node, emitted: fx.Node) -> None:
        """Make `emitted` the value of a captured node."""
        emitted.meta["val"] = node.meta.get("val")
        emitted.meta["fxckpt_node"] = node
        self._values[node] = emitted

    def value(self, node: fx.Node, substitutes: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The emitted node that holds the value of a captured node; views are made anew where they are missing."""
        if substitutes and node in substitutes:
            return substitutes[node]
        stale = substitutes is not None and any(n in substitutes for n in self._viewed(node))
        if node in self._values and not stale:
            return self._values[node]
        if not stale and (node.op == "placeholder" or self._comes_from_before(node)):
            return self._receive(node)
        if node.op == "get_attr":
            emitted = self.graph.create_node("get_attr", node.target, name=node.name)
        elif node.op == "call_function" and (node not in self._profile.map.writes or is_selection(node)):
            args, kwargs = self._arguments(node, substitutes)
            emitted = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        else:
            raise InvalidScheduleError(f"{node.name} is read before it is computed")
        if stale:
            emitted.meta["fxckpt_node"] = node
            emitted.meta["val"] = node.meta.get("val")
            return emitted
        self.place(node, emitted)
        if node in self._profile.map.inlined:
            self._inlined.append(node)
        return emitted

    def _viewed(self, node: fx.Node) -> set[fx.Node]:
        """A node and all that it is a view of."""
        found = {node}
        if node.op == "call_function" and (node not in self._profile.map.writes or is_selection(node)):
            for source in node.all_input_nodes:
                found |= self._viewed(source)
        return found

    def _comes_from_before(self, node: fx.Node) -> bool:
        is_tensor = node in self._profile.map.behind  # a list of views is made anew, not handed over
        return self._before is not None and is_tensor and node in self._before._values

    def _receive(self, node: fx.Node) -> fx.Node:
        placeholder = self.graph.placeholder(node.name)
        self.place(node, placeholder)
        if self._before is None or node.op == "placeholder":
            self.inputs[node] = placeholder
        else:
            source = self._before._values[node]
            self.inputs[source] = placeholder
            self.saved.append(source)
        return placeholder

    def _arguments(self, node: fx.Node, substitutes: dict[fx.Node, fx.Node] | None = None) -> tuple[Any, Any]:
        return fx.node.map_arg((node.args, node.kwargs), lambda n: self.value(n, substitutes))

    # steps

    def step(self, step: int) -> None:
        """Emit one step of the schedule.

        Raises:
            InvalidScheduleError: its op stands for no node of the captured graph.
        """
        index = self._schedule.order[step]
        part, op = self._profile.parts[index], self._profile.graph.ops[index]
        if not part:
            raise InvalidScheduleError(f"step {step} runs {op.name}, which stands for no op of the captured graph")
        again, replay = index in self._executed, iter(op.replay)
        for node in part:
            if again:
                emitted = self._repeat(node, self._replay_of(node, replay))
            else:
                if op.replay and index in self._repeated:
                    self._capture_replay(node, replay)
                emitted = self._call(node, node.name)
            for storage in self._profile.map.writes[node]:
                self._forget(storage)
            self._place_op(node, emitted, step, again=again)
        for node in self._inlined:
            self._values.pop(node, None)
        self._inlined.clear()
        self._executed.add(index)

    def _place_op(self, node: fx.Node, emitted: fx.Node, step: int, *, again: bool) -> None:
        """Make `emitted` what stands for an op's node; of several results, those that are read are picked at once."""
        self.place(node, emitted)
        emitted.meta["fxckpt_step"] = step
        picked = [user for user in node.users if is_selection(user)]
        for user in picked:
            name = f"{user.name}_again" if again else user.name
            self.place(user, self.graph.create_node("call_function", user.target, (emitted, user.args[1]), name=name))
        if picked:
            del self._values[node]

    def _call(self, node: fx.Node, name: str, substitutes: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
        """Call what a captured node calls."""
        args, kwargs = self._arguments(node, substitutes)
        return self.graph.create_node("call_function", node.target, args, kwargs, name=name)

    def _forget(self, storage: int) -> None:
        """A storage is written anew: values in the old copy are not what later readers mean."""
        for node in self._nodes_behind.get(storage, ()):
            self._values.pop(node, None)
            if self._before is not None:
                self._before._values.pop(node, None)

    def _repeat(self, node: fx.Node, replay: list[int]) -> fx.Node:
        name = f"{node.name}_again"
        old = iter([self._replay_value(storage) for storage in replay])
        state = next(old) if is_random(node) and replay else None
        changed = dict(zip(self._changed_inputs(node), old, strict=False))
        if state is None:
            return self._call(node, name, changed or None)
        args, kwargs = self._arguments(node, changed or None)
        arguments = (state, _device(node), node.target, *args)
        return self.graph.create_node("call_function", run_with_rng_state, arguments, kwargs, name=name)

    def _replay_of(self, node: fx.Node, storages: Iterator[int]) -> list[int]:
        """The next of an op's replay storages, as many as this node of it needs."""
        return list(islice(storages, is_random(node) + len(self._changed_inputs(node))))

    def _capture_replay(self, node: fx.Node, storages: Iterator[int]) -> None:
        """Before an op that will be repeated: note generator state and old values of buffers that the step changes."""
        if is_random(node):
            state = self.graph.call_function(rng_state, (_device(node),))
            self.keep_replay(next(storages), state)
        for placeholder in self._changed_inputs(node):
            copy = self.graph.call_function(aten.clone.default, (self.value(placeholder),))
            copy.meta["val"] = placeholder.meta["val"]
            self.keep_replay(next(storages), copy)

    def keep_replay(self, storage: int, emitted: fx.Node) -> None:
        """Make `emitted` the value of a storage that repeats of an op read."""
        emitted.meta["fxckpt_replay"] = self._profile.graph.storages[storage].name
        self._replayed[storage] = emitted

    def _replay_value(self, storage: int) -> fx.Node:
        if storage not in self._replayed:
            source = self._before._replayed.get(storage) if self._before else None
            if source is None:
                name = self._profile.graph.storages[storage].name
                raise InvalidScheduleError(f"{name} was not kept, so what needs it can't be repeated")
            placeholder = self.graph.placeholder(source.name)
            placeholder.meta["val"] = source.meta.get("val")
            self.keep_replay(storage, placeholder)
            self.inputs[source] = placeholder
            self.saved.append(source)
        return self._replayed[storage]

    def _changed_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Placeholders that an op reads and the step changes, in the order of its replay storages."""
        roles, behind = self._profile.joint.roles, self._profile.map.behind
        changed = {behind[i.node]: i.node for i in roles.inputs if i.update is not None}
        return [changed[s] for s in self._profile.map.reads(node) if s in changed]

    # ends

    def deliver(self, inputs: tuple[int, ...]) -> None:
        """Emit the hand-over of some inputs' gradients (None for inputs that have none)."""
        gradients = [self._profile.joint.roles.inputs[i].gradient for i in inputs]
        self.graph.call_function(deliver, tuple(None if g is None else self.value(g) for g in gradients))

    def results(self) -> list[fx.Node]:
        """What the step hands out when forward ends: updates, then outputs."""
        roles = self._profile.joint.roles
        updates = [self.value(i.update) for i in roles.inputs if i.update is not None]
        return updates + [self.value(o.node) for o in roles.outputs]

    def finish(self, results: list[fx.Node], saved: list[fx.Node]) -> None:
        """End the forward graph: return what is handed out, and saved values."""
        handed_out = set(self.graph.find_nodes(op="placeholder"))
        values = []
        for node in (*results, *saved):
            # A tensor that the caller gets becomes part of autograd's graph: anything else needs a tensor of its own.
            values.append(self.graph.call_function(aten.detach.default, (node,)) if node in handed_out else node)
            handed_out.add(node)
        self.graph.output(tuple(values))
        _drop_unused(self.graph)

    def read_outputs(self) -> tuple[int, ...]:
        """Indices of the outputs whose storages are among the saved values."""
        behind = self._profile.map.behind
        saved = {behind[node.meta["fxckpt_node"]] for node in self.saved if "fxckpt_node" in node.meta}
        return tuple(i for i, o in enumerate(self._profile.joint.roles.outputs) if behind[o.node] in saved)

    def place_tangents(self) -> None:
        """Make placeholders for the tangents."""
        for output in self._profile.joint.roles.outputs:
            if output.tangent is not None:
                self.place(output.tangent, self.graph.placeholder(output.tangent.name))

    def order_inputs(self, saved: list[fx.Node]) -> tuple[int, ...]:
        """End the backward graph: saved values come first, then inputs, then tangents. Returns the inputs' indices."""
        roles = self._profile.joint.roles
        self.graph.output(None)
        _drop_unused(self.graph)
        given = tuple(i for i, role in enumerate(roles.inputs) if role.node in self.inputs)
        tangents = {roles.outputs[i].tangent: None for i in self.tangents}
        order = saved + [self.inputs[roles.inputs[i].node] for i in given]
        order += [n for n in self.graph.nodes if n.op == "placeholder" and n.meta.get("fxckpt_node") in tangents]
        for placeholder in reversed(order):
            first = next(iter(self.graph.nodes))
            if first is not placeholder:
                first.prepend(placeholder)
        return given


def _storages_viewed(profile: Profile, node: fx.Node) -> set[int]:
    """The storages that a node's tensor, or its list of views, is in."""
    if node in profile.map.behind:
        return {profile.map.behind[node]}
    if node.op != "call_function" or node in profile.map.writes:
        return set()
    return {profile.map.behind[source] for source in node.all_input_nodes if source in profile.map.behind}


def _device(node: fx.Node) -> str:
    value = next(t for t in pytree.tree_leaves(node.meta["val"]) if isinstance(t, torch.Tensor))
    return str(value.device)


def _drop_unused(graph: fx.Graph) -> None:
    """Erase views and selections that nobody reads; ops stay, since each is a step of the schedule."""
    for node in reversed(list(graph.nodes)):
        is_free = node.op in ("call_function", "get_attr") and "fxckpt_node" in node.meta
        if is_free and "fxckpt_step" not in node.meta and not node.users:
            graph.erase_node(node)
