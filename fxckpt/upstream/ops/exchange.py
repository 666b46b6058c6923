"""Where backward hands what it has of an output's gradient to autograd, and goes on with what comes back.

An output that another output is computed from has hooks, keeps its gradient, or is what gradients are asked for: all
that is autograd's business, in the middle of a planned backward. In the captured graph it is an op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxckpt.upstream.ops.library import LIBRARY

LIBRARY.define("exchange(Tensor[] parts, int number, SymInt[]? stride) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _exchange(parts: Sequence[Tensor], _: int, stride: Sequence[int] | None) -> Tensor:
    """What autograd would add up. No emitted graph calls it: this is to be traced and measured."""
    first = parts[0]
    stride = first.stride() if stride is None else stride
    if len(parts) == 1:
        return first.new_empty_strided(first.shape, stride)
    total = first + parts[1]
    for part in parts[2:]:
        total += part
    return total if total.stride() == tuple(stride) else first.new_empty_strided(first.shape, stride)


LIBRARY.impl("exchange", _exchange, "CompositeExplicitAutograd")

EXCHANGE = torch.ops.fxckpt.exchange.default
"""`exchange(parts, number, stride)`: the parts of the gradient of the output with this tangent number, in the order in
which autograd adds them up, the first of them its tangent, which autograd has; the result has these strides."""
