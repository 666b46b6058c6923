"""The model of torch's caching allocator, against one that only has a list of pieces and looks at all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.core.caching_allocator import AllocatorSettings, Block, CachingAllocator
from fxckpt.units import CUDA_BLOCK_BYTES, whole_blocks

KIB, MIB = 2**10, 2**20


@dataclass
class Piece:
    pool: str
    segment: int
    start: int
    size: int
    used: bool = False


@dataclass
class Plain:
    """By the words of the documentation: pieces in one list, searched from end to end, and joined by starting over."""

    expandable: bool = False
    most_split: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    reserved: int = 0

    def allocate(self, asked: int) -> Piece:
        size = (asked + 511) // 512 * 512
        pool = "small" if size <= MIB else "large"
        fitting = [p for p in self.pieces if not p.used and p.pool == pool and p.size >= size]
        if self.expandable and len(fitting) > 1:
            end = max(p.start + p.size for p in self.pieces if p.pool == pool)
            smallest = min(fitting, key=lambda p: (p.size, p.start))
            if smallest.start + smallest.size == end:
                fitting.remove(smallest)
        best = min(fitting, key=lambda p: (p.size, p.segment, p.start), default=None)
        if best is not None and self.most_split is not None:
            most = size + 20 * MIB if size >= self.most_split else self.most_split
            best = best if best.size < most else None
        if best is None:
            best = self._grow(pool, size) if self.expandable else self._segment(pool, size)
        rest = best.size - size
        splits = rest > MIB and (self.most_split is None or size < self.most_split)
        if pool == "small" or self.expandable:
            splits = rest > 0
        if splits:
            best.size = size
            self.pieces.append(Piece(pool, best.segment, best.start + size, rest))
        best.used = True
        return best

    def _segment(self, pool: str, size: int) -> Piece:
        if pool == "small":
            length = 2 * MIB
        elif size < 10 * MIB:
            length = 20 * MIB
        else:
            length = (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        piece = Piece(pool, self.reserved, 0, length)
        self.reserved += length
        self.pieces.append(piece)
        return piece

    def _grow(self, pool: str, size: int) -> Piece:
        granule = 2 * MIB if pool == "small" else 20 * MIB
        here = [p for p in self.pieces if p.pool == pool]
        end = max((p.start + p.size for p in here), default=0)
        last = next((p for p in here if p.start + p.size == end and not p.used), None)
        if last is None:
            last = Piece(pool, 0, end, 0)
            self.pieces.append(last)
        while last.size < size:
            last.size += granule
            self.reserved += granule
        return last

    def free(self, piece: Piece) -> None:
        piece.used = False
        while self._join_two():
            pass

    def _join_two(self) -> bool:
        for a in self.pieces:
            for b in self.pieces:
                beside = a is not b and (a.pool, a.segment) == (b.pool, b.segment) and a.start + a.size == b.start
                if beside and not a.used and not b.used:
                    a.size += b.size
                    self.pieces = [p for p in self.pieces if p is not b]
                    return True
        return False

    @property
    def allocated(self) -> int:
        return sum(p.size for p in self.pieces if p.used)


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, MIB),
    st.integers(MIB - 600, MIB + 600),
    st.integers(MIB, 10 * MIB),
    st.integers(10 * MIB - 600, 10 * MIB + 600),
    st.integers(10 * MIB, 80 * MIB),
    st.builds(lambda count, more: count * 2 * MIB + more, st.integers(1, 20), st.sampled_from([-512, 0, 1, 512, MIB])),
)
REQUESTS = st.lists(st.tuples(SIZES, st.integers(0, 5)), min_size=1, max_size=40)
"""Sizes to allocate, and after each so many frees: of the blocks in use, one in the middle."""


@settings(max_examples=300)
@given(REQUESTS, st.booleans(), st.sampled_from([None, 24 * MIB, 40 * MIB]))
def test_blocks_are_those_of_a_search_through_all_pieces(
    requests: list[tuple[int, int]], expandable: bool, most_split: int | None
) -> None:
    most_split = None if expandable else most_split
    ours = CachingAllocator(AllocatorSettings(expandable_segments=expandable, max_split_bytes=most_split))
    theirs = Plain(expandable, most_split)
    used: list[tuple[Block | None, Piece]] = []
    for number, (size, frees) in enumerate(requests):
        used.append((ours.allocate(size), theirs.allocate(size)))
        for _ in range(min(frees, len(used)) if frees < 4 else 0):
            block, piece = used.pop((number * 7) % len(used))
            ours.free(block)
            theirs.free(piece)
        assert ours.allocated_bytes == theirs.allocated
        assert ours.reserved_bytes == theirs.reserved
    assert [block.size_bytes for block, _ in used if block] == [piece.size for _, piece in used]


@given(REQUESTS, st.booleans())
def test_peaks_are_the_most_there_was_and_nothing_is_lost(requests: list[tuple[int, int]], expandable: bool) -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=expandable))
    used: list[Block | None] = []
    most_allocated = most_reserved = 0
    for size, frees in requests:
        used.append(allocator.allocate(size))
        most_allocated = max(most_allocated, allocator.allocated_bytes)
        most_reserved = max(most_reserved, allocator.reserved_bytes)
        for _ in range(min(frees, len(used))):
            allocator.free(used.pop())
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (most_allocated, most_reserved)
    for block in used:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    assert sum(block.size_bytes for free in allocator._free.values() for block in free) == allocator.reserved_bytes


@given(st.lists(SIZES, max_size=30))
def test_expandable_segments_split_to_whole_blocks(sizes: list[int]) -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    for size in sizes:
        allocator.allocate(size)
    assert allocator.allocated_bytes == sum(whole_blocks(size, CUDA_BLOCK_BYTES) for size in sizes)


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # no more than 1 MiB would remain: all of it counts
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (13 * MIB, 14 * MIB, 14 * MIB),
    ],
)
def test_a_first_request(size: int, block: int, segment: int) -> None:
    allocator = CachingAllocator()
    made = allocator.allocate(size)
    assert made is not None
    assert (made.size_bytes, allocator.reserved_bytes) == (block, segment)


def test_nothing_takes_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(0) is None
    allocator.free(None)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)
    assert whole_blocks(0, CUDA_BLOCK_BYTES) == 0


@pytest.mark.parametrize(
    ("size", "divisions", "rounded"),
    [
        (1200, (4,), 1536),  # too small to be divided: steps would be of less than a block
        (1200 * KIB, (4,), 1280 * KIB),
        (2048, (4,), 2048),
        (1200, (0,), 1536),
        (600, (2,), 1024),
        (5 * MIB, (1, 1, 8), 5 * MIB),
        (5 * MIB + 1, (1, 1, 8), 5 * MIB + 512 * KIB),
        (300 * MIB, (1, 8), 320 * MIB),  # the last is for all larger ones
        (300 * KIB, (1, 8), 300 * KIB),
    ],
)
def test_requests_rounded_to_divisions_of_powers_of_two(size: int, divisions: tuple[int, ...], rounded: int) -> None:
    assert AllocatorSettings(divisions=divisions).rounded_bytes(size) == rounded
