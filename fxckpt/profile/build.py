"""From the captured fx graph to the torch-free `Graph` that solvers work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxckpt.capture.joint import JointGraph
from fxckpt.capture.nodes import device, has_effects, is_exchange, is_random, sources_first, tensors, value, why_pinned
from fxckpt.core.graph import Graph, Op, Storage, StorageKind
from fxckpt.profile.estimate import count_flops
from fxckpt.profile.storage import StorageMap, map_storages
from fxckpt.units import block_bytes_on, whole_blocks
from fxckpt.upstream.pytree import tree_map_only
from fxckpt.upstream.tensors import memory_bytes

_CPU_STATE_BYTES = 5056
_CUDA_STATE_BYTES = 0  # that of a GPU's generator is held on the host


@dataclass(frozen=True)
class OpCost:
    """Time and inner memory of an op: `time_us` [µs], `workspace_bytes` [B]."""

    time_us: float
    workspace_bytes: int = 0


CostModel = Callable[[fx.Node], OpCost]


@dataclass(frozen=True)
class Profile:
    """A captured step, its `Graph`, and how the two correspond.

    Attributes:
        joint: the captured step.
        map: its storages; `graph.storages` begins with them.
        parts: `parts[i]` are the fx nodes that `graph.ops[i]` stands for, in order: one as a rule, several where they
            run as one, none where the op is an alternative that the captured graph does not have.
        graph: what solvers see.
    """

    joint: JointGraph
    map: StorageMap
    parts: tuple[tuple[fx.Node, ...], ...]
    graph: Graph

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that do work, in the order of their ops."""
        return tuple(node for part in self.parts for node in part)


def build(joint: JointGraph, cost: CostModel, block_bytes: int = 1, map_: StorageMap | None = None) -> Profile:
    """Build the `Graph` of a captured step, with times and workspaces by a cost model.

    Args:
        joint: the captured step.
        cost: what ops cost.
        block_bytes: as for `map_storages`.
        map_: its storages, if not all that it computes is to be in memory.
    """
    map_ = map_ or map_storages(joint, block_bytes)
    working = working_nodes(joint, map_)
    nodes = [n for n in working if n in map_.forward] + [n for n in working if n not in map_.forward]
    parts = tuple(_parts(nodes, map_))
    further = _FurtherStorages(joint, map_)
    ops = tuple(_op(part, joint, map_, further, cost) for part in parts)
    roles = joint.roles
    gradients = [i.gradient for i in roles.inputs if i.gradient is not None]
    graph = Graph(
        ops=ops,
        storages=(*map_.storages, *further.storages),
        forward_count=sum(part[0] in map_.forward for part in parts),
        outputs=_behind(map_, [o.node for o in roles.outputs]),
        updates=_behind(map_, [i.update for i in roles.inputs if i.update is not None]),
        gradients=tuple(dict.fromkeys((*_behind(map_, gradients), *further.kept))),
        allocated_gradient_bytes=sum(_size_bytes(g, block_bytes) for g in gradients),
        delivered_at_end=any(map(is_exchange, nodes)),
    )
    graph.check()
    return Profile(joint, map_, parts, graph)


def _parts(nodes: list[fx.Node], map_: StorageMap) -> Iterator[tuple[fx.Node, ...]]:
    """The nodes of each op: one, or several that are joined."""
    part: list[fx.Node] = []
    for node in nodes:
        part.append(node)
        if node not in map_.joined:
            yield tuple(part)
            part = []


def working_nodes(joint: JointGraph, map_: StorageMap | None = None) -> list[fx.Node]:
    """The nodes that do work, in the order of the captured graph."""
    map_ = map_ or map_storages(joint)
    return [n for n in joint.module.graph.nodes if n in map_.writes]


def _behind(map_: StorageMap, nodes: list[fx.Node]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map_.behind[n] for n in nodes))


class _FurtherStorages:
    """Storages that no node stands for.

    Some exist only so that an op can be repeated: generator states, and buffers before they are changed. Others belong
    to whoever wants the gradient of an output.

    Attributes:
        storages: all of them.
        kept: those that backward must not count as free before it ends, and others of the graph that it must not.
    """

    def __init__(self, joint: JointGraph, map_: StorageMap) -> None:
        self._offset = len(map_.storages)
        self._changed = {map_.behind[i.node] for i in joint.roles.inputs if i.update is not None}
        self._map = map_
        self.storages: list[Storage] = []
        self.kept: list[int] = []

    def exchanged(self, node: fx.Node) -> tuple[int, ...]:
        """What a node that hands a gradient over makes others keep, beside what it writes: a copy (`retain_grad`).

        Where the gradient is but one part, a view of something larger, that is kept too.
        """
        if not is_exchange(node):
            return ()
        (written,) = self._map.writes[node]
        storages = self._map.storages
        size_bytes = storages[written].size_bytes
        self.kept += [s for s in self._map.reads(node) if storages[s].size_bytes > size_bytes]
        self.kept.append(self._add(f"{node.name}.kept", size_bytes, "backward"))
        return (self.kept[-1],)

    def replayed(self, node: fx.Node) -> tuple[int, ...]:
        found = []
        if is_random(node):
            found.append(self._add(f"{node.name}.rng_state", _state_bytes(node)))
        for storage in self._map.reads(node):
            if storage in self._changed:
                name = f"{node.name}.{self._map.storages[storage].name}"
                found.append(self._add(name, self._map.storages[storage].size_bytes))
        return tuple(found)

    def _add(self, name: str, size_bytes: int, kind: StorageKind = "activation") -> int:
        self.storages.append(Storage(name, size_bytes, kind))
        return self._offset + len(self.storages) - 1


def _op(
    part: tuple[fx.Node, ...], joint: JointGraph, map_: StorageMap, further: _FurtherStorages, cost: CostModel
) -> Op:
    pinned = next(filter(None, map(why_pinned, part)), "")
    costs = [cost(node) for node in part]
    # A repeated draw copies the generator's present state, before its outputs are there.
    repeat_bytes = [_state_bytes(node) - written_bytes(node) for node in part if is_random(node) and not pinned]
    module, source = joint.places[part[0]]
    written = tuple(dict.fromkeys(s for node in part for s in map_.writes[node]))
    return Op(
        name=part[-1].name,
        target=" ".join(str(node.target) for node in part),
        reads=tuple(dict.fromkeys(s for node in part for s in map_.reads(node) if s not in written)),
        writes=(*written, *(s for node in part for s in further.exchanged(node))),
        replay=() if pinned else tuple(s for node in part for s in further.replayed(node)),
        time_us=sum(spent.time_us for spent in costs),
        flops=sum(map(count_flops, part)),
        workspace_bytes=max(0, *(spent.workspace_bytes for spent in costs), *repeat_bytes),
        pinned=pinned,
        ordered=any(map(has_effects, part)),
        module=module,
        source=source,
        signature=";".join(op_form(n) for node in part for n in (*inlined_into(node, map_), node)),
    )


def inlined_into(node: fx.Node, map_: StorageMap) -> list[fx.Node]:
    """The nodes that an op computes on the way to its own results, each once, behind those that it reads."""
    return sources_first(node.all_input_nodes, map_.inlined.__contains__)


def op_form(node: fx.Node) -> str:
    """What op a node is, apart from its place in the graph: target, constants, and form of every tensor."""
    args = tree_map_only(fx.Node, lambda n: _form(value(n)), (node.args, node.kwargs))
    return f"{node.target}{args}"


def written_bytes(node: fx.Node) -> int:
    """Bytes of the storages that an op's outputs live in [B]."""
    return memory_bytes(tensors(node))


def _form(made: Any) -> str:
    if not isinstance(made, torch.Tensor):
        return repr(made)
    return f"{made.dtype}{list(made.shape)}{list(made.stride())}@{made.device}".replace("torch.", "")


def _state_bytes(node: fx.Node) -> int:
    return _CPU_STATE_BYTES if device(node).type in ("cpu", "meta") else _CUDA_STATE_BYTES


def _size_bytes(node: fx.Node, block_bytes: int) -> int:
    """Bytes of tensors of the form of an op's results [B]."""
    block_bytes = block_bytes_on(device(node).type, block_bytes)
    return sum(whole_blocks(t.numel() * t.element_size(), block_bytes) for t in tensors(node))
