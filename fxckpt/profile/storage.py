"""Which storages stand behind the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxckpt.capture.joint import JointGraph
from fxckpt.capture.nodes import is_selection, tensors, value
from fxckpt.capture.roles import InputKind
from fxckpt.core.graph import Storage, StorageKind
from fxckpt.upstream.tensors import occupied_bytes, storage_key


@dataclass(frozen=True)
class StorageMap:
    """Storages of a captured graph.

    Attributes:
        storages: all of them.
        behind: for each node that yields a tensor, the storage that the tensor is in.
        writes: for each node that does work, the storages it allocates; nodes that are missing here only make views.
        forward: the forward nodes that do work.
        inlined: nodes whose values are never in memory, since the ops that read them compute them on the way; each with
            the storages that it is computed from.
        joined: ops that are one step with the op after them, which writes over their result.
        over: storages that are written over others, which nobody reads any more, and so take no memory of their own.
    """

    storages: tuple[Storage, ...]
    behind: dict[fx.Node, int]
    writes: dict[fx.Node, tuple[int, ...]]
    forward: frozenset[fx.Node]
    inlined: Mapping[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    joined: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    over: Mapping[int, int] = field(default_factory=dict)

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node does no work: it looks at memory that others wrote, or picks one of an op's results."""
        return node.op == "call_function" and node not in self.writes

    def reads(self, node: fx.Node) -> tuple[int, ...]:
        """The storages that a node reads, each once."""
        if not self.inlined:
            return tuple(dict.fromkeys(self.behind[n] for n in node.all_input_nodes if n in self.behind))
        found: dict[int, None] = {}
        for n in node.all_input_nodes:
            found.update(dict.fromkeys(self.inlined.get(n, (self.behind[n],) if n in self.behind else ())))
        return tuple(found)


def map_storages(joint: JointGraph, block_bytes: int = 1) -> StorageMap:
    """Group the tensors of the graph by the memory they live in.

    Fake tensors share storages exactly as the real ones will, so identity of their storages is what counts.

    Args:
        joint: the captured step.
        block_bytes: sizes are rounded up to multiples of this, as the allocator of the device does that a step is
            planned for which was traced as if on the CPU [B].
    """
    graph = joint.module.graph
    on_cuda = any(t.device.type == "cuda" for node in graph.nodes if node.op == "placeholder" for t in tensors(node))
    forward = forward_nodes(joint)
    kinds = _given_kinds(joint)
    storages: list[Storage] = []
    index_of: dict[int | None, int] = {}
    behind: dict[fx.Node, int] = {}
    writes: dict[fx.Node, tuple[int, ...]] = {}

    def add(name: str, tensor: torch.Tensor, kind: StorageKind) -> int:
        is_aside = on_cuda and tensor.device.type == "cpu"  # seeds and numbers, which take nothing of the device
        storages.append(Storage(name, 0 if is_aside else occupied_bytes(tensor, block_bytes), kind))
        return len(storages) - 1

    for node in graph.nodes:
        if node.op == "output" or (node.op == "placeholder" and node not in kinds):
            continue  # a tangent that backward does not start from: nobody gives one
        made = value(node)
        if node.op in ("placeholder", "get_attr"):
            tensor = made if isinstance(made, torch.Tensor) else getattr(joint.module, str(node.target), None)
            if isinstance(tensor, torch.Tensor):
                key = storage_key(tensor)
                if key not in index_of:
                    index_of[key] = add(node.name, tensor, kinds.get(node, "buffer"))
                behind[node] = index_of[key]
            continue
        if is_selection(node):
            if isinstance(made, torch.Tensor):
                behind[node] = index_of[storage_key(made)]
            continue
        kind: StorageKind = "activation" if node in forward else "backward"
        written = []
        outputs = list(_tensors_written(node))
        for name, tensor in outputs:
            key = storage_key(tensor)
            if key not in index_of:
                index_of[key] = add(name, tensor, kind)
                written.append(index_of[key])
        if isinstance(made, torch.Tensor):
            behind[node] = index_of[storage_key(made)]
        if written or not outputs:
            writes[node] = tuple(written)
    return StorageMap(tuple(storages), behind, writes, forward)


def forward_nodes(joint: JointGraph) -> frozenset[fx.Node]:
    """Nodes that run in forward: all that outputs and updates need, and those autograd put there."""
    ends = [o.node for o in joint.roles.outputs] + [i.update for i in joint.roles.inputs if i.update is not None]
    needed: set[fx.Node] = set()
    stack = ends
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    tangents = {o.tangent for o in joint.roles.outputs}
    after: set[fx.Node] = set()  # nodes that depend on a tangent
    for node in joint.module.graph.nodes:
        if node in tangents or any(n in after for n in node.all_input_nodes):
            after.add(node)
        elif node.op in ("call_function", "get_attr") and node.meta.get("partitioner_tag") == "is_forward":
            needed.add(node)
    return frozenset(needed - after)


def _given_kinds(joint: JointGraph) -> dict[fx.Node, StorageKind]:
    names: dict[InputKind, StorageKind] = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.ATTRIBUTE: "buffer",
        InputKind.ARGUMENT: "input",
    }
    kinds = {i.node: names[i.kind] for i in joint.roles.inputs}
    return kinds | {o.tangent: "tangent" for o in joint.roles.outputs if o.tangent is not None}


def _tensors_written(node: fx.Node) -> list[tuple[str, torch.Tensor]]:
    """Names and values of the tensors that an op returns; those that nobody reads are allocated all the same."""
    made = value(node)
    if isinstance(made, torch.Tensor):
        return [(node.name, made)]
    if not isinstance(made, (tuple, list)):
        return []
    picked = {user.args[1]: user for user in node.users if is_selection(user)}
    named = []
    for position, tensor in enumerate(made):
        user = picked.get(position)
        tensor = value(user) if user is not None else tensor
        if isinstance(tensor, torch.Tensor):
            named.append((user.name if user is not None else f"{node.name}[{position}]", tensor))
    return named
