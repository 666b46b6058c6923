"""FLOPs of fused attention: those of torch's registry, and those of keys repeated for each head of queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import flop_registry, shape_wrapper

from fxckpt.profile.estimate import ATTENTION_FLOPS
from fxckpt.upstream.operators import ATTENTION, ATTENTION_BACKWARD


def _tensors(kernel: Any, key_heads: int) -> list[torch.Tensor]:
    heads = {"result": 8, "query": 8, "key": key_heads, "value": key_heads}
    sizes = {"result": (16, 24), "query": (16, 32), "key": (20, 32), "value": (20, 24)}
    taken = ("query", "key", "value") if kernel in ATTENTION else ("result", "query", "key", "value")
    return [torch.empty(2, heads[name], *sizes[name], device="meta") for name in taken]


def _flops(formula: Any, tensors: list[torch.Tensor]) -> int:
    return int(formula(*tensors, out_val=None))


@pytest.mark.parametrize("kernel", (*ATTENTION, *ATTENTION_BACKWARD), ids=str)
def test_grouped_heads_cost_what_repeated_ones_do(kernel: Any) -> None:
    formula = shape_wrapper(ATTENTION_FLOPS[kernel])
    assert _flops(formula, _tensors(kernel, 2)) == _flops(formula, _tensors(kernel, 8)) > 0


@pytest.mark.parametrize("kernel", [op for op in ATTENTION_FLOPS if op in flop_registry], ids=str)
def test_flops_are_those_of_torch(kernel: Any) -> None:
    tensors = _tensors(kernel, 8)
    assert _flops(shape_wrapper(ATTENTION_FLOPS[kernel]), tensors) == _flops(flop_registry[kernel], tensors)
