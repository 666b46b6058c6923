"""Elementwise ops have the strides that their kernels give them, also where dims have size 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fxckpt.upstream.strides import right_strides

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "relu": torch.relu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "a square": lambda x: x**2,
    "clamp": lambda x: x.clamp(0, 1),
    "by a number": lambda x: x / 1.5,
    "a number by it": lambda x: 1 / x,
    "plus a number": lambda x: x + 1,
    "a number minus it": lambda x: 1 - x,
    "a product": lambda x: x * x,
    "a sum with a row": lambda x: x + torch.ones(x.shape[-1], device=x.device),
    "by a tensor of one number": lambda x: x / torch.ones((), device=x.device),
    "a comparison": lambda x: x > 0,
    "comparisons": lambda x: (x > 0) & (x < 1),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked": lambda x: x.masked_fill(x > 0, 0.0),
    "remainder": lambda x: torch.remainder(x, 2.0),
    "floor division": lambda x: x // 2,
    "maximum": lambda x: torch.maximum(x, x * 2),
    "a cast": lambda x: x.to(torch.bfloat16),
    "zeros": torch.zeros_like,
    "a copy": torch.clone,
    "flipped": lambda x: x.flip(0),
}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape with dims of size 1, and dense strides in any order of dims, those of size 1 with any."""
    shape = tuple(draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step if shape[dim] > 1 else draw(st.integers(1, 12))
        step *= shape[dim]
    return shape, tuple(strides)


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=40, derandomize=True, database=None)
@given(layouts())
def test_strides_of_results(name: str, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x = torch.linspace(0.5, 2.0, 100).as_strided(*layout)
    expected = FUNCTIONS[name](x)
    with right_strides(), FakeTensorMode() as mode:
        found = FUNCTIONS[name](mode.from_tensor(x))
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())
