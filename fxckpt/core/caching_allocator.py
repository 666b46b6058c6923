"""How torch's caching allocator for CUDA hands out memory: the same blocks for the same requests, in one stream.

What torch counts as allocated is blocks, not what was asked for. A request of up to 1 MiB is cut from a segment of
2 MiB, a larger one of less than 10 MiB from one of 20 MiB, and a still larger one has a segment of its own, of whole
2 MiB. The smallest free block that is large enough is taken; a large one is not split where no more than 1 MiB would
remain, so all of it counts. Blocks that are freed are joined with free neighbours and kept. With expandable segments
there is one segment of small and one of large blocks, which grow at their ends, and every block is split.

After `c10/cuda/CUDACachingAllocator.cpp` (torch 2.11 to 2.15). What is left out is what happens when the device runs
out of memory, and `garbage_collection_threshold`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

from fxckpt.units import CUDA_BLOCK_BYTES, whole_blocks

_MIB = 2**20
_SMALL_BYTES = _MIB
_SMALL_SEGMENT_BYTES = 2 * _MIB
_OWN_SEGMENT_BYTES = 10 * _MIB
_SEGMENT_STEP_BYTES = 2 * _MIB
_FIRST_DIVIDED = 20  # divisions are given for sizes from 2**20, from 2**21, and so on
_FAR = 2**46  # between the addresses of small and of large expandable segments


@dataclass(frozen=True)
class AllocatorSettings:
    """What may be set of the allocator, by `PYTORCH_CUDA_ALLOC_CONF`.

    Attributes:
        expandable_segments: whether segments grow.
        large_segment_bytes: size of the segments for blocks from 1 to 10 MiB [B].
        max_split_bytes: blocks of this size or more are not split; None: all are [B].
        max_non_split_rounding_bytes: how much larger than the request such a block may be [B].
        divisions: requests are rounded up to so many steps between powers of two: from 1 MiB (and below), from 2 MiB,
            and so on, the last for all larger ones; 0 or 1: they are not.
    """

    expandable_segments: bool = False
    large_segment_bytes: int = 20 * _MIB
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = 20 * _MIB
    divisions: tuple[int, ...] = ()

    def rounded_bytes(self, size_bytes: int) -> int:
        """The smallest block for a request [B]."""
        if self.divisions:
            interval = min(max(size_bytes.bit_length() - 1 - _FIRST_DIVIDED, 0), len(self.divisions) - 1)
            divisions = self.divisions[interval]
            if divisions > 1 and size_bytes > CUDA_BLOCK_BYTES * divisions:
                floor_bytes = 1 << (size_bytes.bit_length() - 1)
                step_bytes = floor_bytes >> (divisions.bit_length() - 1)
                return -(-size_bytes // step_bytes) * step_bytes
        return whole_blocks(size_bytes, CUDA_BLOCK_BYTES)

    def segment_bytes(self, rounded_bytes: int) -> int:
        """The segment that is made for a block which fits no free one [B]."""
        if rounded_bytes <= _SMALL_BYTES:
            return _SMALL_SEGMENT_BYTES
        if rounded_bytes < _OWN_SEGMENT_BYTES:
            return self.large_segment_bytes
        return -(-rounded_bytes // _SEGMENT_STEP_BYTES) * _SEGMENT_STEP_BYTES


class Block:
    """A piece of a segment, allocated or free, between its neighbours in the segment."""

    __slots__ = ("address", "after", "before", "is_free", "is_small", "size_bytes")

    def __init__(self, address: int, size_bytes: int, *, is_small: bool) -> None:
        self.address, self.size_bytes, self.is_small = address, size_bytes, is_small
        self.is_free = False
        self.before: Block | None = None
        self.after: Block | None = None

    def __lt__(self, other: Block) -> bool:
        return (self.size_bytes, self.address) < (other.size_bytes, other.address)


class CachingAllocator:
    """The allocator of one device and stream, at first without any memory.

    Attributes:
        allocated_bytes, reserved_bytes: what `torch.cuda.memory_allocated` and `memory_reserved` say [B].
        peak_allocated_bytes, peak_reserved_bytes: the most that they have been [B].
    """

    def __init__(
        self, settings: AllocatorSettings | None = None, segment_address: Callable[[int], int] | None = None
    ) -> None:
        """Without memory.

        Args:
            settings: as they are by default, if not given.
            segment_address: where a new segment of some bytes is, which decides between free blocks of the same size;
                behind all others if not given.
        """
        self.settings = settings or AllocatorSettings()
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self._segment_address = segment_address or (lambda _: self.reserved_bytes)
        self._free: dict[bool, list[Block]] = {True: [], False: []}  # by whether they are small
        self._last: dict[bool, Block | None] = {True: None, False: None}  # of expandable segments

    def allocate(self, size_bytes: int) -> Block | None:
        """The block for a request; None if it is for nothing."""
        if not size_bytes:
            return None
        wanted_bytes = self.settings.rounded_bytes(size_bytes)
        block = self._best_fit(wanted_bytes)
        if block is None:
            block = self._grown(wanted_bytes) if self.settings.expandable_segments else self._segment(wanted_bytes)
        self._split(block, wanted_bytes)
        self.allocated_bytes += block.size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Take a block back."""
        if block is None:
            return
        self.allocated_bytes -= block.size_bytes
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                self._join(block, neighbour)
        self._keep(block)

    def _best_fit(self, wanted_bytes: int) -> Block | None:
        """The smallest free block that is large enough, no longer free."""
        is_small, settings = wanted_bytes <= _SMALL_BYTES, self.settings
        free = self._free[is_small]
        place = bisect_left(free, wanted_bytes, key=lambda block: block.size_bytes)
        if settings.expandable_segments and place + 1 < len(free) and free[place] is self._last[is_small]:
            place += 1  # what can grow counts as larger
        if place == len(free):
            return None
        found_bytes, most_bytes = free[place].size_bytes, settings.max_split_bytes
        if most_bytes is not None:
            if wanted_bytes < most_bytes <= found_bytes:
                return None
            if wanted_bytes >= most_bytes and found_bytes >= wanted_bytes + settings.max_non_split_rounding_bytes:
                return None
        block = free.pop(place)
        block.is_free = False
        return block

    def _segment(self, wanted_bytes: int) -> Block:
        """A new segment as one block."""
        size_bytes = self.settings.segment_bytes(wanted_bytes)
        block = Block(self._segment_address(size_bytes), size_bytes, is_small=wanted_bytes <= _SMALL_BYTES)
        self._reserve(size_bytes)
        return block

    def _grown(self, wanted_bytes: int) -> Block:
        """The end of the expandable segment, grown until it is large enough."""
        is_small = wanted_bytes <= _SMALL_BYTES
        step_bytes = _SMALL_SEGMENT_BYTES if is_small else self.settings.large_segment_bytes
        last = self._last[is_small]
        if last is None or not last.is_free:
            address = (0 if is_small else _FAR) if last is None else last.address + last.size_bytes
            block = Block(address, 0, is_small=is_small)
            block.before = last
            if last is not None:
                last.after = block
        else:
            self._take(last)
            block = last
        more_bytes = -(-(wanted_bytes - block.size_bytes) // step_bytes) * step_bytes
        block.size_bytes += more_bytes
        self._last[is_small] = block
        self._reserve(more_bytes)
        return block

    def _reserve(self, size_bytes: int) -> None:
        self.reserved_bytes += size_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _split(self, block: Block, wanted_bytes: int) -> None:
        """Cut off what is more than wanted, where that is worth it."""
        remaining_bytes, settings = block.size_bytes - wanted_bytes, self.settings
        if block.is_small or settings.expandable_segments:
            worth_it = remaining_bytes >= CUDA_BLOCK_BYTES
        else:
            below = settings.max_split_bytes is None or wanted_bytes < settings.max_split_bytes
            worth_it = below and remaining_bytes > _SMALL_BYTES
        if not worth_it:
            return
        rest = Block(block.address + wanted_bytes, remaining_bytes, is_small=block.is_small)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        if self._last[block.is_small] is block:
            self._last[block.is_small] = rest
        block.after, block.size_bytes = rest, wanted_bytes
        self._keep(rest)

    def _join(self, block: Block, neighbour: Block) -> None:
        """Let a block take in its neighbour, which is no longer used."""
        if neighbour is block.before:
            block.address, block.before = neighbour.address, neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block
        block.size_bytes += neighbour.size_bytes
        if self._last[block.is_small] is neighbour:
            self._last[block.is_small] = block

    def _keep(self, block: Block) -> None:
        block.is_free = True
        insort(self._free[block.is_small], block)

    def _take(self, block: Block) -> None:
        free = self._free[block.is_small]
        del free[bisect_left(free, block)]
        block.is_free = False
