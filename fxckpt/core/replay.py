"""What a schedule takes of the device by the rule of the caching allocator: its allocations, replayed in order.

A simulation adds up sizes. What torch counts as allocated may be more, since blocks are not always split, and what it
takes from the device is more again, since free blocks are kept. Both depend on the order of all allocations, which the
schedule fixes; so it can be replayed in a model of the allocator, from an empty one on: parameters, buffers, inputs,
what libraries keep and gradients first, then steps, until one leaves the allocator as the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fxckpt.core.caching_allocator import AllocatorSettings, Block, CachingAllocator
from fxckpt.core.graph import RESIDENT, Graph
from fxckpt.core.lifetimes import Lifetime
from fxckpt.core.simulate import Timeline

_STEPS = 3
"""Of a training are replayed: the first finds no free blocks, the others what those before have left."""


@dataclass(frozen=True)
class Occupancy:
    """The most memory that training takes of a device by the rule of the caching allocator.

    Attributes:
        allocated_bytes: blocks in use, as `torch.cuda.max_memory_allocated` counts them [B].
        reserved_bytes: with those that are free but kept, as `torch.cuda.max_memory_reserved` counts them [B].
    """

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Blocks:
    """What a plan and the plain step take in blocks."""

    plan: Occupancy
    baseline: Occupancy


def replay(timeline: Timeline, settings: AllocatorSettings, written_over: Mapping[int, int] | None = None) -> Occupancy:
    """The most memory that steps of a schedule take.

    Within a step, an op allocates its results in their order and then its workspace.

    Args:
        timeline: the simulated schedule.
        settings: of the allocator.
        written_over: for each step that writes its result over an input, the storage of that input.
    """
    return _Replay(timeline, settings, written_over or {}).occupancy


class _Replay:
    def __init__(self, timeline: Timeline, settings: AllocatorSettings, written_over: Mapping[int, int]) -> None:
        self._timeline, self._written_over = timeline, written_over
        self._allocator = CachingAllocator(settings)
        self._sizes_bytes = timeline.graph.sizes_bytes("device")

    @cached_property
    def occupancy(self) -> Occupancy:
        self._allocate_what_is_there()
        before = None
        for _ in range(_STEPS):
            self._step()
            state = self._allocator.reserved_bytes, self._allocator.peak_allocated_bytes
            if state == before:
                break
            before = state
        reserve_bytes = self._timeline.graph.reserved_bytes
        allocator = self._allocator
        return Occupancy(allocator.peak_allocated_bytes + reserve_bytes, allocator.peak_reserved_bytes + reserve_bytes)

    def _allocate_what_is_there(self) -> None:
        graph, allocate = self._timeline.graph, self._allocator.allocate
        for storage, size_bytes in zip(graph.storages, self._sizes_bytes, strict=True):
            if storage.kind in RESIDENT:
                allocate(size_bytes)
        allocate(graph.library_bytes)
        if graph.gradients_allocated:
            for size_bytes in _gradient_sizes_bytes(graph):
                allocate(size_bytes)

    def _step(self) -> None:
        ops, order = self._timeline.graph.ops, self._timeline.schedule.order
        blocks: dict[Lifetime, Block | None] = {}
        allocator = self._allocator
        for step, index in enumerate(order):
            ending = self._ending[step]
            over = self._written_over.get(step)
            for life in self._beginning[step]:
                old = next((x for x in ending if x.storage == over and x is not life), None)
                if old is not None and life.storage in ops[index].writes:
                    blocks[life], over = blocks.pop(old), None
                else:
                    blocks[life] = allocator.allocate(self._sizes_bytes[life.storage])
            allocator.free(allocator.allocate(ops[index].workspace_bytes))
            for life in ending:
                allocator.free(blocks.pop(life, None))

    @cached_property
    def _beginning(self) -> list[list[Lifetime]]:
        lives: list[list[Lifetime]] = [[] for _ in self._timeline.schedule.order]
        for life in self._timeline.lifetimes:
            lives[life.born].append(life)
        return lives

    @cached_property
    def _ending(self) -> list[list[Lifetime]]:
        lives: list[list[Lifetime]] = [[] for _ in self._timeline.schedule.order]
        for life in self._timeline.lifetimes:
            lives[life.dies].append(life)
        return lives


def _gradient_sizes_bytes(graph: Graph) -> list[int]:
    """Sizes of allocated gradients, which together take `allocated_gradient_bytes` [B]."""
    sizes_bytes = [graph.storages[s].size_bytes for s in graph.gradients]
    fits = sum(sizes_bytes) == graph.allocated_gradient_bytes
    return sizes_bytes if fits else [graph.allocated_gradient_bytes]
