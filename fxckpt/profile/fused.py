"""Which values a compiler that fuses keeps in registers, and what its kernels cost.

An op of the plan is then a kernel: it computes what is really in memory (a matrix product, a reduction, an elementwise
result that one of those reads) from other such storages. Elementwise ops between them take no memory and are computed
wherever they are read, at the price of the bytes that they read.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxckpt.capture.joint import JointGraph
from fxckpt.core.graph import RESIDENT
from fxckpt.profile.build import CostModel, OpCost
from fxckpt.profile.devices import DeviceProfile
from fxckpt.profile.estimate import roofline_us
from fxckpt.profile.storage import StorageMap
from fxckpt.upstream.fusible import is_fusible, is_pointwise

_MOST_READS = 6
"""So many large operands a kernel reads at most."""
_SMALL = 8
"""An operand of less than an eighth of the result is read for nothing, as the statistics of a norm are."""


def fuse(joint: JointGraph, map_: StorageMap) -> StorageMap:
    """The storages of a step of which elementwise results are left out that are computed where they are read.

    A result is left out if all who read it run in kernels, and it is computed from one large operand, or read once in
    its own half of the step by something that is no larger; so nothing is read that would not be anyway.
    """
    inlined = _Inlining(joint, map_).inlined
    gone = {map_.writes[node][0] for node in inlined if node in map_.writes}
    kept = [storage for storage in range(len(map_.storages)) if storage not in gone]
    new = {old: number for number, old in enumerate(kept)}
    return StorageMap(
        storages=tuple(map_.storages[storage] for storage in kept),
        behind={node: new[storage] for node, storage in map_.behind.items() if node not in inlined},
        writes={node: tuple(new[s] for s in written) for node, written in map_.writes.items() if node not in inlined},
        forward=map_.forward,
        inlined={node: tuple(new[s] for s in storages) for node, storages in inlined.items()},
    )


class _Inlining:
    """Decides node by node, in the order of the graph, from which storages each is computed."""

    def __init__(self, joint: JointGraph, map_: StorageMap) -> None:
        self._map = map_
        self.inlined: dict[fx.Node, tuple[int, ...]] = {}
        roles = joint.roles
        handed_out = [o.node for o in roles.outputs] + [n for i in roles.inputs for n in (i.update, i.gradient) if n]
        self._handed_out = {map_.behind[node] for node in handed_out}
        for node in joint.module.graph.nodes:
            if node.op == "call_function" and self._is_inlined(node):
                self.inlined[node] = self._sources(node)

    def _is_inlined(self, node: fx.Node) -> bool:
        written = self._map.writes.get(node)
        if written is None:  # a view, which is made anew with what it is a view of
            return any(source in self.inlined for source in node.all_input_nodes)
        if len(written) != 1 or written[0] in self._handed_out or not is_pointwise(node):
            return False
        readers = self._readers(node)
        if not readers or not all(map(is_fusible, readers)):
            return False
        large = [s for s in self._sources(node) if self._bytes(s) * _SMALL >= self._bytes(written[0])]
        if len(large) > _MOST_READS:
            return False
        return sum(not self._is_given(s) for s in large) <= 1 or self._is_read_once(node, readers)

    def _is_read_once(self, node: fx.Node, readers: list[fx.Node]) -> bool:
        """By something that is computed in the same half of the step, and is no larger."""
        if len(readers) > 1 or (readers[0] in self._map.forward) != (node in self._map.forward):
            return False
        (written,) = self._map.writes[node]
        return all(self._bytes(s) <= self._bytes(written) for s in self._map.writes[readers[0]])

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads it, directly or through views."""
        found: dict[fx.Node, None] = {}
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if self._map.is_view(user):
                stack += user.users
            else:
                found[user] = None
        return list(found)

    def _sources(self, node: fx.Node) -> tuple[int, ...]:
        return replace(self._map, inlined=self.inlined).reads(node)

    def _bytes(self, storage: int) -> int:
        return self._map.storages[storage].size_bytes

    def _is_given(self, storage: int) -> bool:
        return self._map.storages[storage].kind in RESIDENT


def kernel_costs(map_: StorageMap, libraries: CostModel, device: DeviceProfile) -> CostModel:
    """What ops cost where elementwise ops are computed on the way: a kernel takes the time of the bytes that it moves.

    Args:
        map_: what is in memory.
        libraries: costs of the ops that call a library.
        device: what moves the bytes.
    """

    def cost(node: fx.Node) -> OpCost:
        if not is_fusible(node):
            return libraries(node)
        moved = sum(map_.storages[s].size_bytes for s in (*map_.reads(node), *map_.writes[node]))
        return OpCost(roofline_us(device, 0, moved, "float32"))

    return cost
