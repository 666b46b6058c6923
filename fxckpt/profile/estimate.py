"""Cost models that run nothing: time from floating-point operations and bytes moved.

An op takes the longer of its arithmetic and its memory traffic, plus a fixed launch time (the roofline model; Williams,
Waterman and Patterson, 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, shape_wrapper

from fxckpt.capture.nodes import tensors, value
from fxckpt.upstream.operators import ATTENTION, ATTENTION_BACKWARD
from fxckpt.upstream.pytree import tree_map_only


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do.

    Attributes:
        name: how it is called.
        flops_per_s: arithmetic by type of number; "float32" is the fall-back [1/s].
        bytes_per_s: memory traffic [B/s].
        launch_us: time that any op takes at least [µs].
        allocation_bytes: the allocator rounds sizes up to multiples of this [B].
    """

    name: str
    flops_per_s: dict[str, float]
    bytes_per_s: float
    launch_us: float
    allocation_bytes: int = 1


_REFERENCE = DeviceProfile("reference", {"float32": 60e9}, 20e9, 2.0)

DEVICES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        _REFERENCE,
        # A generic server core pair; `measure` knows the real machine.
        DeviceProfile("cpu", {"float32": 60e9, "bfloat16": 30e9, "float16": 20e9, "float64": 30e9}, 20e9, 2.0),
        # Vendors' data sheets, dense, without sparsity; float32 on tensor cores is TF32 only where the user allows it.
        DeviceProfile(
            "A100", {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "float64": 19.5e12}, 2.04e12, 4.0, 512
        ),
        DeviceProfile(
            "H100", {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12, "float64": 67e12}, 3.35e12, 4.0, 512
        ),
        DeviceProfile(
            "RTX 4090",
            {"float32": 82.6e12, "bfloat16": 165e12, "float16": 165e12, "float64": 1.3e12},
            1.01e12,
            4.0,
            512,
        ),
    )
}


_Shape = Sequence[int]


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    return _pairs(query, key) * 2 * (query[-1] + value[-1])


def _attention_backward_flops(_: _Shape, query: _Shape, key: _Shape, value: _Shape, *__: Any, **___: Any) -> int:
    return _pairs(query, key) * 2 * (3 * query[-1] + 2 * value[-1])


def _pairs(query: _Shape, key: _Shape) -> int:
    """Pairs of a query and a key. Several heads of queries may share one of keys, which is computed with each of them."""
    batch, heads, queries, _ = query
    return batch * heads * queries * key[-2]


ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(ATTENTION, _attention_flops),
    **dict.fromkeys(ATTENTION_BACKWARD, _attention_backward_flops),
}
"""From the shapes of the arguments to floating-point operations. Torch's own registry lacks some of these ops, and in
some versions refuses that queries have more heads than keys."""

_WRAPPED = {packet: shape_wrapper(formula) for packet, formula in ATTENTION_FLOPS.items()}


def count_flops(node: fx.Node) -> int:
    """Floating-point operations of a matrix product, convolution or attention; 0 for other ops."""
    packet = getattr(node.target, "overloadpacket", None)
    args, kwargs = tree_map_only(fx.Node, value, (node.args, node.kwargs))
    formula = _WRAPPED.get(packet) or flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=value(node))) if formula else 0


def traffic_bytes(node: fx.Node) -> int:
    """Bytes of all tensors that the op takes and returns [B]."""
    return sum(t.numel() * t.element_size() for n in (*node.all_input_nodes, node) for t in tensors(n))


def roofline_us(profile: DeviceProfile, flops: int, bytes_moved: int, dtype: torch.dtype) -> float:
    """Time of an op on a device [µs]."""
    rate = profile.flops_per_s.get(str(dtype).removeprefix("torch."), profile.flops_per_s["float32"])
    return max(flops / rate, bytes_moved / profile.bytes_per_s) * 1e6 + profile.launch_us


def estimate_us(node: fx.Node, profile: DeviceProfile) -> float:
    """Time of a node on a device [µs].

    With the profile "reference" the FLOPs are those of torch's own registry, which does not know attention on CPU.
    """
    flops = count_flops(node)
    if profile is _REFERENCE and getattr(node.target, "overloadpacket", None) not in flop_registry:
        flops = 0
    return roofline_us(profile, flops, traffic_bytes(node), _dtype(node))


def _dtype(node: fx.Node) -> torch.dtype:
    return next((t.dtype for t in tensors(node)), torch.float32)
