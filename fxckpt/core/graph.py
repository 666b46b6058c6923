"""The training step as data: ops, and the storages they read and write.

A `Graph` is what solvers see. It holds no tensors and needs no torch: sizes, times and wiring only. Views are folded
away (an op that reads a view reads the storage behind it), so every op here does work and every byte is counted once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import fsum
from typing import Any, Literal, get_args

from fxckpt.errors import PlanFormatError

StorageKind = Literal["parameter", "buffer", "input", "tangent", "activation", "backward"]
RESIDENT: frozenset[StorageKind] = frozenset(("parameter", "buffer", "input"))
"""Kinds of the storages that are there before the step and stay: free to save."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A piece of memory: what one allocation holds, however many tensors are views of it.

    `kind` says where it comes from. "parameter", "buffer" and "input" are there before the step and stay; "tangent"
    (the gradient of an output) appears when backward starts; "activation" is written by a forward op, "backward" by a
    backward op.
    """

    name: str
    size_bytes: int
    kind: StorageKind


@dataclass(frozen=True, slots=True)
class Op:
    """One op of the captured graph.

    Attributes:
        name: name of the fx node, unique in the graph.
        target: what it calls, such as "aten.addmm.default".
        reads: indices of the storages it reads, each once.
        writes: indices of the storages it allocates; an op that is repeated allocates them anew.
        replay: storages captured when the op first runs and read when it is repeated: random-number state, old values
            of buffers that the step changes. They take no memory unless the op is repeated.
        time_us: time by the cost model [µs].
        flops: floating-point operations of matrix products, convolutions and attention; 0 for all other ops.
        workspace_bytes: memory that only the running op needs [B].
        pinned: why the op must not be repeated, or "" if it may be.
        ordered: whether its first run must keep its place among the other ordered ops (it draws random numbers,
            communicates, or has another effect).
        module: path of the module that called it, such as "blocks.3.attn".
        source: the user's source line, "file:line".
        signature: what op it is, apart from its place: equal strings mean the same call on the same shapes.
    """

    name: str
    target: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    replay: tuple[int, ...] = ()
    time_us: float = 0.0
    flops: int = 0
    workspace_bytes: int = 0
    pinned: str = ""
    ordered: bool = False
    module: str = ""
    source: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Graph:
    """A training step: forward ops, then backward ops, in the order in which the plain model runs them.

    Attributes:
        ops: all ops; the first `forward_count` are the forward ones.
        storages: all storages.
        forward_count: number of forward ops.
        outputs: storages handed to the caller by forward; they stay live to the end of the step.
        updates: storages copied into buffers when forward ends; they stay live until then.
        gradients: storages of the gradients of parameters and inputs. Delivered as they are produced; live to the end
            of the step if gradients are fresh, until their delivery if they are already allocated.
        gradients_allocated: whether `.grad` holds tensors before the step (gradient accumulation). If so their
            bytes are counted all the time.
        allocated_gradient_bytes: what those tensors take [B].
        reserved_bytes: memory that the caller declares, such as optimizer state [B].
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

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """For each storage the index of the op that writes it, or -1 for what the step is given."""
        producer = [-1] * len(self.storages)
        for index, op in enumerate(self.ops):
            for storage in op.writes:
                producer[storage] = index
        return tuple(producer)

    @cached_property
    def replayed(self) -> frozenset[int]:
        """Storages that exist only to repeat an op (see `Op.replay`)."""
        return frozenset(storage for op in self.ops for storage in op.replay)

    @cached_property
    def static_bytes(self) -> int:
        """Bytes that are there during the whole step: parameters, buffers, inputs, allocated gradients, reserve [B]."""
        given = sum(s.size_bytes for s in self.storages if s.kind in RESIDENT)
        return given + self.reserved_bytes + (self.allocated_gradient_bytes if self.gradients_allocated else 0)

    @cached_property
    def step_us(self) -> float:
        """Time of one plain step by the cost model: every op once [µs]."""
        return fsum(op.time_us for op in self.ops)

    def bytes_of(self, storages: Iterable[int]) -> int:
        """Bytes of several storages together [B]."""
        return sum(self.storages[s].size_bytes for s in storages)

    @cached_property
    def stage_bytes(self) -> int:
        """Gradients are handed over when this many bytes of them are waiting [B].

        Each handover takes time, and frees memory only where gradients are allocated already.
        """
        stages = 128 if self.gradients_allocated else 8
        return max(self.bytes_of(self.gradients) // stages, 1)

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
        ]
        return hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16]

    @cached_property
    def structure(self) -> str:
        """A hash of ops and wiring alone: equal for the same model at another batch size."""
        structure = [[op.target, op.reads, op.writes, op.replay, bool(op.pinned)] for op in self.ops]
        return hashlib.sha256(json.dumps([structure, self.forward_count]).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; `from_dict` reads it back."""
        columns = [f.name for f in fields(Op)]
        return {
            "ops": {name: [getattr(op, name) for op in self.ops] for name in columns},
            "storages": {f.name: [getattr(s, f.name) for s in self.storages] for f in fields(Storage)},
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("ops", "storages")},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Graph:
        """The graph that `to_dict` wrote.

        Raises:
            PlanFormatError: a part is missing or of the wrong type, or an index points nowhere.
        """
        try:
            graph = cls(
                ops=tuple(Op(**_valid(Op, row)) for row in _rows(data["ops"], Op)),
                storages=tuple(Storage(**_valid(Storage, row)) for row in _rows(data["storages"], Storage)),
                **_valid(cls, {f.name: data[f.name] for f in fields(cls) if f.name not in ("ops", "storages")}),
            )
            graph.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanFormatError(f"this is not a graph written by fxckpt: {error}") from error
        return graph

    def check(self) -> None:
        """Raise ValueError where an index points nowhere, a size is negative, or an op reads what comes later."""
        count = len(self.storages)
        if not 0 <= self.forward_count <= len(self.ops):
            raise ValueError(f"forward_count is {self.forward_count} of {len(self.ops)} ops")
        for storage in self.storages:
            if not isinstance(storage.size_bytes, int) or storage.size_bytes < 0:
                raise ValueError(f"storage {storage.name} has size_bytes {storage.size_bytes!r}")
            if storage.kind not in get_args(StorageKind):
                raise ValueError(f"storage {storage.name} has kind {storage.kind!r}")
        for index in (*self.outputs, *self.updates, *self.gradients):
            if not 0 <= index < count:
                raise ValueError(f"there is no storage {index}")
        written = {i for i, s in enumerate(self.storages) if s.kind in RESIDENT} | self.replayed
        for position, op in enumerate(self.ops):
            if position == self.forward_count:
                written |= {i for i, s in enumerate(self.storages) if s.kind == "tangent"}
            for index in (*op.reads, *op.writes, *op.replay):
                if not 0 <= index < count:
                    raise ValueError(f"op {op.name} names storage {index}, but there are {count}")
            missing = [self.storages[s].name for s in op.reads if s not in written]
            if missing:
                raise ValueError(f"op {op.name} reads {missing[0]} before it is written")
            written.update(op.writes)


def _rows(columns: Mapping[str, Any], kind: type) -> list[dict[str, Any]]:
    names = [f.name for f in fields(kind)]
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]


_MOST_BYTES = 2**46
"""A larger size is a damaged file; sums over all storages and ops of a file that can be read fit 64 bits."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_BYTES


_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "int": _is_count,
    "float": lambda value: type(value) in (int, float) and 0 <= value <= 1e18,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "tuple[int, ...]": lambda value: type(value) is tuple and all(map(_is_count, value)),
    "StorageKind": lambda value: value in get_args(StorageKind),
}
"""By annotation: whether a value from a file may become a field."""


def _valid(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of fields, lists made tuples. Raises ValueError for a value that the field can't have."""
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for field in fields(kind):
        if field.name in frozen and not _IS_VALID[str(field.type)](frozen[field.name]):
            raise ValueError(f"{kind.__name__}.{field.name} is {frozen[field.name]!r}")
    return frozen
