"""Which values a compiler that fuses keeps in registers, and what its kernels cost.

An op of the plan is then a kernel: it computes what is really in memory (a matrix product, a reduction, an elementwise
result that one of those reads) from other such storages. Elementwise ops between them take no memory and are computed
wherever they are read, at the price of the bytes that they read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

from torch import fx

from fxckpt.capture.joint import JointGraph
from fxckpt.capture.nodes import fills, is_exchange
from fxckpt.core.graph import RESIDENT
from fxckpt.profile.build import CostModel, OpCost, Profile, inlined_into
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
    fused = replace(
        map_,
        behind={node: storage for node, storage in map_.behind.items() if node not in inlined},
        writes={node: written for node, written in map_.writes.items() if node not in inlined},
        inlined=inlined,
    )
    fused = _renumbered(fused, gone, {})
    return _joined(joint, fused)


def _joined(joint: JointGraph, map_: StorageMap) -> StorageMap:
    """The same where an op's result, which only the elementwise op after it reads, is in the memory of that one's.

    Both are one step of a schedule then, such as a product and the activation function behind it.
    """
    handed_out = _handed_out(joint, map_)
    readers: dict[int, set[fx.Node]] = {}
    for node in map_.writes:
        for storage in map_.reads(node):
            readers.setdefault(storage, set()).add(node)
    joined: dict[fx.Node, fx.Node] = {}
    same: dict[int, int] = {}
    working = [n for n in joint.module.graph.nodes if n in map_.writes]
    for half in ([n for n in working if n in map_.forward], [n for n in working if n not in map_.forward]):
        for first, second in pairwise(half):
            if len(map_.writes[first]) != 1 or len(map_.writes[second]) != 1 or not is_pointwise(second):
                continue
            (storage,) = map_.writes[first]
            if (
                storage not in handed_out
                and readers.get(storage) == {second}
                and _reads_in_place(second, storage, map_)
            ):
                joined[first] = second
                same[storage] = map_.writes[second][0]
    return _renumbered(replace(map_, joined=joined), {*same}, same)


def _renumbered(map_: StorageMap, gone: Collection[int], same: Mapping[int, int]) -> StorageMap:
    """The storages without those that are gone; who means one of these means the storage that is the `same`, if any."""

    def final(storage: int) -> int:
        while storage in same:
            storage = same[storage]
        return storage

    kept = [storage for storage in range(len(map_.storages)) if storage not in gone]
    number = {storage: place for place, storage in enumerate(kept)}

    def new(storages: Iterable[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(number[final(storage)] for storage in storages))

    return replace(
        map_,
        storages=tuple(map_.storages[storage] for storage in kept),
        behind={node: number[final(storage)] for node, storage in map_.behind.items()},
        writes={node: new(written) for node, written in map_.writes.items()},
        inlined={node: new(storages) for node, storages in map_.inlined.items()},
    )


def _handed_out(joint: JointGraph, map_: StorageMap) -> set[int]:
    """Storages that leave the step."""
    roles = joint.roles
    nodes = [o.node for o in roles.outputs] + [n for i in roles.inputs for n in (i.update, i.gradient) if n]
    return {map_.behind[node] for node in nodes} | exchanged(map_)


def exchanged(map_: StorageMap) -> set[int]:
    """Storages that hooks of outputs see, or make: nobody may write over them."""
    nodes = [node for node in map_.writes if is_exchange(node)]
    return {storage for node in nodes for storage in (*map_.reads(node), *map_.writes[node])}


class _Inlining:
    """Decides node by node, in the order of the graph, from which storages each is computed."""

    def __init__(self, joint: JointGraph, map_: StorageMap) -> None:
        self.inlined: dict[fx.Node, tuple[int, ...]] = {}
        self._map = replace(map_, inlined=self.inlined)  # reads through what is inlined so far
        self._handed_out = _handed_out(joint, map_)
        for node in joint.module.graph.nodes:
            if node.op == "call_function" and self._is_inlined(node):
                self.inlined[node] = self._map.reads(node)

    def _is_inlined(self, node: fx.Node) -> bool:
        written = self._map.writes.get(node)
        if written is None:  # a view, which is made anew with what it is a view of
            return any(source in self.inlined for source in node.all_input_nodes)
        if len(written) != 1 or written[0] in self._handed_out or not is_pointwise(node):
            return False
        readers = self._readers(node)
        if not readers or not all(map(is_fusible, readers)):
            return False
        large = [s for s in self._map.reads(node) if self._bytes(s) * _SMALL >= self._bytes(written[0])]
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

    def _bytes(self, storage: int) -> int:
        return self._map.storages[storage].size_bytes

    def _is_given(self, storage: int) -> bool:
        return self._map.storages[storage].kind in RESIDENT


def overwriting(profile: Profile) -> Profile:
    """The step with backward kernels that write over what nobody reads later: the result takes no memory of its own.

    The operand's memory is in use as long as the result is. Such a kernel runs once.
    """
    graph, map_ = profile.graph, profile.map
    kept = {*graph.outputs, *graph.updates, *graph.gradients, *exchanged(map_)}
    last = {storage: index for index, op in enumerate(graph.ops) for storage in op.reads}
    over: dict[int, int] = {}
    ops = list(graph.ops)
    for index in range(graph.forward_count, graph.plain_count):
        op, node = graph.ops[index], profile.parts[index][-1]
        if len(op.writes) != 1 or op.writes[0] in kept or not is_pointwise(node):
            continue
        for storage in op.reads:
            is_own = graph.storages[storage].kind in ("activation", "backward") and storage not in kept
            if is_own and last[storage] == index and _reads_in_place(node, storage, map_):
                over[op.writes[0]] = storage
                ops[index] = replace(op, pinned="it writes over what it reads")
                break
    if not over:
        return profile
    storages = tuple(replace(s, size_bytes=0) if number in over else s for number, s in enumerate(graph.storages))
    reading = tuple(replace(op, reads=tuple(dict.fromkeys(_with_memory(op.reads, over)))) for op in ops)
    return replace(profile, graph=replace(graph, storages=storages, ops=reading), map=replace(map_, over=over))


def _with_memory(storages: Iterable[int], over: Mapping[int, int]) -> Iterator[int]:
    """The storages, and those whose memory they are in."""
    for storage in storages:
        yield storage
        while storage in over:
            storage = over[storage]
            yield storage


def _reads_in_place(node: fx.Node, storage: int, map_: StorageMap) -> bool:
    """Whether a kernel reads a storage, which the value of one node fills, at the places that it writes."""
    found = [
        source
        for part in (*inlined_into(node, map_), node)
        for source in part.all_input_nodes
        if map_.behind.get(source) == storage
    ]
    return bool(found) and all(fills(source, node) for source in found)


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
