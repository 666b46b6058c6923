"""What a graph is made of: ops, and the storages they read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StorageKind = Literal["parameter", "buffer", "input", "tangent", "activation", "backward"]
RESIDENT: frozenset[StorageKind] = frozenset(("parameter", "buffer", "input"))
"""Kinds of the storages that are there before the step and stay: free to save."""

Place = Literal["device", "host", "disk"]
Engine = Literal["compute", "network", "copy_out", "copy_in"]


@dataclass(frozen=True, slots=True)
class Storage:
    """A piece of memory: what one allocation holds, however many tensors are views of it.

    `kind` says where it comes from. "parameter", "buffer" and "input" are there before the step and stay; "tangent"
    (the gradient of an output) appears when backward starts; "activation" is written by a forward op, "backward" by a
    backward op.

    `place` says which memory it takes: the device's, as all that plain models compute with, or one that is larger and
    farther away.
    """

    name: str
    size_bytes: int
    kind: StorageKind
    place: Place = "device"


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
        engine: what carries it out, beside the others: "compute", the "network" between devices, or copies out of the
            device's memory and into it. See `fxckpt.core.engines`.
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
    engine: Engine = "compute"
