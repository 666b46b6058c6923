"""Cost models that run nothing: time from floating-point operations and bytes moved.

An op takes the longer of its arithmetic and its memory traffic, plus a fixed launch time (the roofline model; Williams,
Waterman and Patterson, 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.utils.flop_counter import flop_registry, shape_wrapper

from fxckpt.capture.nodes import is_collective, tensors, value
from fxckpt.profile.devices import REFERENCE, DeviceProfile
from fxckpt.profile.settings import tf32_in_convolutions, tf32_in_products
from fxckpt.upstream.operators import ATTENTION, ATTENTION_BACKWARD
from fxckpt.upstream.pytree import tree_map_only

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


def roofline_us(profile: DeviceProfile, flops: int, bytes_moved: int, numbers: str) -> float:
    """Time of an op on a device that computes with `numbers` of this type [µs]."""
    rate = profile.flops_per_s.get(numbers, profile.flops_per_s["float32"])
    return max(flops / rate, bytes_moved / profile.bytes_per_s) * 1e6 + profile.launch_us


def estimate_us(node: fx.Node, profile: DeviceProfile) -> float:
    """Time of a node on a device [µs].

    With the profile "reference" the FLOPs are those of torch's own registry, which does not know attention on CPU.
    """
    flops = count_flops(node)
    if profile is REFERENCE and getattr(node.target, "overloadpacket", None) not in flop_registry:
        flops = 0
    if is_collective(node) and profile.link_bytes_per_s:
        return traffic_bytes(node) / profile.link_bytes_per_s * 1e6 + profile.launch_us
    return roofline_us(profile, flops, traffic_bytes(node), _numbers(node) if flops else "float32")


def _numbers(node: fx.Node) -> str:
    """The type of number that an op computes with: "tf32" where that is allowed for float32."""
    numbers = next((str(t.dtype).removeprefix("torch.") for t in tensors(node)), "float32")
    if numbers != "float32":
        return numbers
    return "tf32" if (tf32_in_convolutions() if "conv" in str(node.target) else tf32_in_products()) else numbers
