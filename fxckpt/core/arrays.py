"""A graph's ops and storages as arrays: made once a graph, so that a schedule is walked without a loop in Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from fxckpt.core.ops import RESIDENT, Op, Storage

Integers = npt.NDArray[np.int64]


class Rows:
    """Rows of numbers of different lengths.

    Attributes:
        lengths, starts: of each row, and where it starts among all.
        numbers: those of all rows, one row after another.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = integers(map(len, rows))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.numbers = integers(chain.from_iterable(rows))

    def of(self, chosen: Integers) -> tuple[Integers, Integers]:
        """The numbers of some rows, one after another, and for each of them which of the chosen rows it is of."""
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths)
        which = np.repeat(np.arange(len(chosen)), lengths)
        places = np.arange(len(which)) + (self.starts[chosen] - ends + lengths)[which]
        return self.numbers[places], which

    def owners(self) -> Integers:
        """For each of `numbers` the row that it is of."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a walk of a schedule looks up.

    Attributes:
        resident, tangent, replayed: for each storage whether it is there before the step, appears when backward starts,
            or exists only to repeat an op.
        device_bytes: what each storage takes of the device [B].
        times_us, workspace_bytes, pinned: of each op [µs, B].
        ordered: indices of the ordered ops.
        reading, read: pairs of an op and a storage that it reads.
        writing, written: pairs of an op and a storage that it writes.
        reads, writes: what runs read and write, as rows: of each op's first run, then of each op's repeats, and in the
            last one, which reads nothing, what appears when backward starts. Without what is there before the step.
    """

    resident: npt.NDArray[np.bool_]
    tangent: npt.NDArray[np.bool_]
    replayed: npt.NDArray[np.bool_]
    device_bytes: Integers
    times_us: npt.NDArray[np.float64]
    workspace_bytes: Integers
    pinned: npt.NDArray[np.bool_]
    ordered: Integers
    reading: Integers
    read: Integers
    writing: Integers
    written: Integers
    reads: Rows
    writes: Rows

    @classmethod
    def of(cls, ops: Sequence[Op], storages: Sequence[Storage]) -> Arrays:
        """Those of a graph of these ops and storages."""
        resident = [s.kind in RESIDENT for s in storages]
        tangents = [i for i, s in enumerate(storages) if s.kind == "tangent"]
        replayed = frozenset(s for op in ops for s in op.replay)
        changing = [tuple(s for s in op.reads if not resident[s]) for op in ops]
        plain_reads, plain_writes = Rows([op.reads for op in ops]), Rows([op.writes for op in ops])
        return cls(
            resident=np.array(resident, dtype=np.bool_),
            tangent=np.array([s.kind == "tangent" for s in storages], dtype=np.bool_),
            replayed=np.array([i in replayed for i in range(len(storages))], dtype=np.bool_),
            device_bytes=integers(s.size_bytes if s.place == "device" else 0 for s in storages),
            times_us=np.array([op.time_us for op in ops], dtype=np.float64),
            workspace_bytes=integers(op.workspace_bytes for op in ops),
            pinned=np.array([bool(op.pinned) for op in ops], dtype=np.bool_),
            ordered=integers(index for index, op in enumerate(ops) if op.ordered),
            reading=plain_reads.owners(),
            read=plain_reads.numbers,
            writing=plain_writes.owners(),
            written=plain_writes.numbers,
            reads=Rows([*changing, *((*r, *op.replay) for r, op in zip(changing, ops, strict=True)), ()]),
            writes=Rows([*((*op.replay, *op.writes) for op in ops), *(op.writes for op in ops), tangents]),
        )


def integers(numbers: Iterable[int]) -> Integers:
    """An array of whole numbers."""
    return np.fromiter(numbers, np.int64)
