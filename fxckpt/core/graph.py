"""The training step as data: ops, and the storages they read and write.

A `Graph` is what solvers see. It holds no tensors and needs no torch: sizes, times and wiring only. Views are folded
away (an op that reads a view reads the storage behind it), so every op here does work and every byte is counted once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import fsum
from typing import TYPE_CHECKING, Any, get_args

from fxckpt.core.arrays import Arrays
from fxckpt.core.fields import columns, records, valid
from fxckpt.core.ops import RESIDENT, Engine, Op, Place, Storage, StorageKind
from fxckpt.errors import PlanFormatError

if TYPE_CHECKING:
    import networkx as nx

    Node = tuple[str, int]

__all__ = ["RESIDENT", "Engine", "Graph", "Op", "Place", "Storage", "StorageKind"]

_FORMAT = 2  # of `Graph.to_dict`; 1 had no alternatives, engines and places


@dataclass(frozen=True)
class Graph:
    """A training step: forward ops, then backward ops, in the order in which the plain model runs them.

    Behind these plain ops stand alternatives: further ways to have a storage than to run again the op that writes it.
    To copy an activation to the host is one that writes a storage of its own, to copy it back one that writes the
    activation. A schedule may run them in either half, or not at all.

    Attributes:
        ops: all ops; the first `forward_count` are the forward ones, the last `alternatives` no part of the plain step.
        storages: all storages.
        forward_count: number of forward ops.
        outputs: storages handed to the caller by forward; they stay live to the end of the step.
        updates: storages copied into buffers when forward ends; they stay live until then.
        gradients: storages of the gradients of parameters and inputs, and of others that somebody may keep. Delivered
            as they are produced; live to the end of the step if gradients are fresh, until their delivery if they are
            already allocated.
        gradients_allocated: whether `.grad` holds tensors before the step (gradient accumulation). If so their
            bytes are counted all the time.
        allocated_gradient_bytes: what those tensors take [B].
        reserved_bytes: memory that the caller declares, such as optimizer state [B].
        library_bytes: memory that libraries keep for good once they have been called, such as cuBLAS's workspaces [B].
        alternatives: number of ops behind the plain ones.
        delivered_at_end: whether all gradients are delivered together, when backward ends.
    """

    ops: tuple[Op, ...]
    storages: tuple[Storage, ...]
    forward_count: int
    outputs: tuple[int, ...] = ()
    updates: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    gradients_allocated: bool = False
    allocated_gradient_bytes: int = 0
    reserved_bytes: int = 0
    library_bytes: int = 0
    alternatives: int = 0
    delivered_at_end: bool = False

    @cached_property
    def plain_count(self) -> int:
        """Number of ops of the plain step, forward and backward."""
        return len(self.ops) - self.alternatives

    @property
    def plain_ops(self) -> tuple[Op, ...]:
        """Forward and backward ops."""
        return self.ops[: self.plain_count]

    @property
    def backward_ops(self) -> tuple[Op, ...]:
        """The plain ops behind the forward ones."""
        return self.ops[self.forward_count : self.plain_count]

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """For each storage the index of the plain op that writes it; -1 for what the step is given, and for what only
        alternatives write."""
        producer = [-1] * len(self.storages)
        for index, op in enumerate(self.plain_ops):
            for storage in op.writes:
                producer[storage] = index
        return tuple(producer)

    @cached_property
    def ways(self) -> tuple[tuple[int, ...], ...]:
        """For each storage the indices of the alternatives that write it."""
        ways: list[tuple[int, ...]] = [()] * len(self.storages)
        for index in range(self.plain_count, len(self.ops)):
            for storage in self.ops[index].writes:
                ways[storage] += (index,)
        return tuple(ways)

    @cached_property
    def asynchronous(self) -> frozenset[int]:
        """Indices of the ops that another engine than compute carries out."""
        return frozenset(index for index, op in enumerate(self.ops) if op.engine != "compute")

    @cached_property
    def forward_reads(self) -> tuple[tuple[int, ...], ...]:
        """For each op the storages that it reads and a forward op writes."""
        made = frozenset(s for op in self.ops[: self.forward_count] for s in op.writes)
        return tuple(tuple(s for s in op.reads if s in made) for op in self.ops)

    @cached_property
    def gradient_ops(self) -> frozenset[int]:
        """Indices of the ops that write gradients."""
        gradients = frozenset(self.gradients)
        return frozenset(index for index, op in enumerate(self.ops) if not gradients.isdisjoint(op.writes))

    @cached_property
    def replayed(self) -> frozenset[int]:
        """Storages that exist only to repeat an op (see `Op.replay`)."""
        return frozenset(storage for op in self.ops for storage in op.replay)

    @cached_property
    def arrays(self) -> Arrays:
        """Ops and storages as arrays."""
        return Arrays.of(self.ops, self.storages)

    def sizes_bytes(self, place: Place) -> tuple[int, ...]:
        """What each storage takes of a memory [B]."""
        return self._device_bytes if place == "device" else self._sizes_bytes(place)

    @cached_property
    def _device_bytes(self) -> tuple[int, ...]:
        return self._sizes_bytes("device")

    def _sizes_bytes(self, place: Place) -> tuple[int, ...]:
        return tuple(s.size_bytes if s.place == place else 0 for s in self.storages)

    def given_bytes(self, place: Place) -> int:
        """Bytes of a memory that parameters, buffers and inputs take [B]."""
        sizes_bytes = self.sizes_bytes(place)
        return sum(sizes_bytes[i] for i, s in enumerate(self.storages) if s.kind in RESIDENT)

    @cached_property
    def static_bytes(self) -> int:
        """Bytes of the device that are in use during the whole step: parameters, buffers, inputs, allocated gradients,
        reserve, what libraries keep [B]."""
        allocated = self.allocated_gradient_bytes if self.gradients_allocated else 0
        return self.given_bytes("device") + self.reserved_bytes + self.library_bytes + allocated

    @cached_property
    def step_us(self) -> float:
        """Time of the plain ops by the cost model, each once, one after the other [µs]."""
        return fsum(op.time_us for op in self.plain_ops)

    def bytes_of(self, storages: Iterable[int]) -> int:
        """Bytes of several storages together [B]."""
        return sum(self.storages[s].size_bytes for s in storages)

    @cached_property
    def own_outputs_bytes(self) -> int:
        """Bytes of the outputs that are not there anyway, as a parameter or an input that is returned is [B]."""
        return self.bytes_of(frozenset(s for s in self.outputs if self.storages[s].kind not in RESIDENT))

    @cached_property
    def stage_bytes(self) -> int:
        """Gradients are handed over when this many bytes of them are waiting [B].

        Each handover takes time, and frees memory only where gradients are allocated already.
        """
        if self.delivered_at_end:
            return self.bytes_of(self.gradients) + 1
        stages = 128 if self.gradients_allocated else 8
        return max(self.bytes_of(self.gradients) // stages, 1)

    def to_networkx(self, *, alternatives: bool = False) -> nx.DiGraph[Node]:
        """The step as a directed graph of ops and storages, for the algorithms of networkx.

        Nodes are ("op", index) and ("storage", index), with the fields of `Op` and `Storage` as attributes, and for ops
        `part`: "forward", "backward" or "alternative". An arc leads from each op to what it writes, and from each
        storage to the ops that read it; `time_us` of an arc is the time of the op that reads [µs], so that a longest
        path adds up the ops on it.

        Args:
            alternatives: whether these are in it, and what only they write. The plain step has no circle; with
                alternatives, what is sent away and comes back is one.

        >>> ops = (Op("f", "relu", (0,), (1,), time_us=2.0), Op("g", "exp", (1,), (2,), time_us=3.0))
        >>> storages = (Storage("x", 8, "input"), Storage("y", 8, "activation"), Storage("z", 8, "activation"))
        >>> import networkx as nx
        >>> net = Graph(ops, storages, 2, outputs=(2,)).to_networkx()
        >>> nx.dag_longest_path(net, weight="time_us")
        [('storage', 0), ('op', 0), ('storage', 1), ('op', 1)]
        >>> nx.immediate_dominators(net, ("storage", 0))[("storage", 2)]
        ('op', 1)
        >>> net.nodes["op", 1]["target"], nx.dag_longest_path_length(net, weight="time_us")
        ('exp', 5.0)
        """
        import networkx as nx

        net: nx.DiGraph[Node] = nx.DiGraph()
        for index, storage in enumerate(self.storages):
            if alternatives or self.producer[index] >= 0 or not self.ways[index]:
                net.add_node(("storage", index), **asdict(storage))
        for index, op in enumerate(self.ops if alternatives else self.plain_ops):
            part = "forward" if index < self.forward_count else "backward"
            net.add_node(("op", index), part=part if index < self.plain_count else "alternative", **asdict(op))
            net.add_edges_from(((("storage", s), ("op", index)) for s in op.reads), time_us=op.time_us)
            net.add_edges_from(((("op", index), ("storage", s)) for s in op.writes), time_us=0.0)
        return net

    def with_gradients(self, allocated: bool) -> Graph:
        """The same step with gradients fresh or already allocated."""
        return self if allocated == self.gradients_allocated else replace(self, gradients_allocated=allocated)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on ops, wiring and sizes, and not on times, names of files or accounting."""
        structure = [
            [[op.target, op.reads, op.writes, op.replay, op.signature, bool(op.pinned)] for op in self.ops],
            [[s.size_bytes, s.kind] for s in self.storages],
            [self.forward_count, self.outputs, self.updates, self.gradients],
            *self._beyond_the_plain(),
        ]
        return hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16]

    @cached_property
    def structure(self) -> str:
        """A hash of ops and wiring alone: equal for the same model at another batch size."""
        structure = [[op.target, op.reads, op.writes, op.replay, bool(op.pinned)] for op in self.ops]
        parts = [structure, self.forward_count, *self._beyond_the_plain()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _beyond_the_plain(self) -> list[Any]:
        """Alternatives, engines and places, if there is anything to say of them: nothing in most graphs."""
        engines, places = [op.engine for op in self.ops], [s.place for s in self.storages]
        usual = not self.alternatives and {*engines} <= {"compute"} and {*places} <= {"device"}
        return [] if usual else [[self.alternatives, engines, places]]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; `from_dict` reads it back."""
        return {
            "format": _FORMAT,
            "ops": columns(Op, self.ops),
            "storages": columns(Storage, self.storages),
            **{name: getattr(self, name) for name in _scalars()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Graph:
        """The graph that `to_dict` wrote, now or before there were alternatives.

        Raises:
            PlanFormatError: a part is missing or of the wrong type, an index points nowhere, or a storage is written by
                more or fewer plain ops than one.
        """
        try:
            data = _upgraded(data)
            graph = cls(
                ops=records(Op, data["ops"]),
                storages=records(Storage, data["storages"]),
                **valid(cls, {name: data[name] for name in _scalars()}),
            )
            graph.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanFormatError(f"this is not a graph written by fxckpt: {error}") from error
        return graph

    def check(self) -> None:
        """Raise ValueError where the graph is none that can run.

        Where an index points nowhere, a size is negative, an op reads what comes later, a storage has more or fewer
        plain writers than one, or an alternative writes what is always there.
        """
        count = len(self.storages)
        if not 0 <= self.alternatives <= len(self.ops):
            raise ValueError(f"alternatives is {self.alternatives} of {len(self.ops)} ops")
        if not 0 <= self.forward_count <= self.plain_count:
            raise ValueError(f"forward_count is {self.forward_count} of {self.plain_count} ops")
        for storage in self.storages:
            if not isinstance(storage.size_bytes, int) or storage.size_bytes < 0:
                raise ValueError(f"storage {storage.name} has size_bytes {storage.size_bytes!r}")
            if storage.kind not in get_args(StorageKind) or storage.place not in get_args(Place):
                raise ValueError(f"storage {storage.name} has kind {storage.kind!r} and place {storage.place!r}")
        for op in self.ops:
            if op.engine not in get_args(Engine):
                raise ValueError(f"op {op.name} has engine {op.engine!r}")
            for index in (*op.reads, *op.writes, *op.replay):
                if not 0 <= index < count:
                    raise ValueError(f"op {op.name} names storage {index}, but there are {count}")
        for index in (*self.outputs, *self.updates, *self.gradients):
            if not 0 <= index < count:
                raise ValueError(f"there is no storage {index}")
        self._check_writers()
        self._check_reads()

    def _check_writers(self) -> None:
        """Each storage that an op has to write is written by one plain op, or by alternatives alone."""
        writers = Counter(s for op in self.plain_ops for s in op.writes)
        for index, storage in enumerate(self.storages):
            given = storage.kind in RESIDENT or storage.kind == "tangent" or index in self.replayed
            number, others = writers[index], len(self.ways[index])
            if (given and number + others) or (not given and number != 1 and not (number == 0 and others)):
                raise ValueError(
                    f"storage {storage.name} of kind {storage.kind} is written by {number} plain ops and {others} "
                    "alternatives"
                )
        for index in (*self.outputs, *self.updates, *self.gradients):
            if self.producer[index] < 0 and self.ways[index]:
                raise ValueError(f"storage {self.storages[index].name} leaves the step, but no plain op writes it")
        for op in self.ops[self.plain_count :]:
            if op.ordered:
                raise ValueError(f"op {op.name} is an alternative, which may be left out, so it can't be ordered")

    def _check_reads(self) -> None:
        written = {i for i, s in enumerate(self.storages) if s.kind in RESIDENT} | self.replayed
        for position, op in enumerate(self.ops):
            if position == self.forward_count:
                written |= {i for i, s in enumerate(self.storages) if s.kind == "tangent"}
            missing = [self.storages[s].name for s in op.reads if s not in written]
            if missing:
                raise ValueError(f"op {op.name} reads {missing[0]} before it is written")
            written.update(op.writes)


def _scalars() -> list[str]:
    """Fields of a graph that are one value each in a file."""
    return [field.name for field in fields(Graph) if field.name not in ("ops", "storages")]


def _upgraded(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A graph's file as the latest format has it."""
    if "format" not in data:  # the first format did not say which it was
        ops, storages = data["ops"], data["storages"]
        data = {
            **data,
            "ops": {**ops, "engine": ["compute"] * len(ops["name"])},
            "storages": {**storages, "place": ["device"] * len(storages["name"])},
            "alternatives": 0,
        }
    elif type(data["format"]) is not int or data["format"] != _FORMAT:
        raise ValueError(f"its format is {data['format']!r}, and {_FORMAT} is the latest that is known here")
    return {"library_bytes": 0, "delivered_at_end": False, **data}  # some files of this format have none
