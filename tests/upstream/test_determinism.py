"""Which calls draw random numbers, and which give other results when they run again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxckpt.upstream.determinism import draws_random_numbers, may_differ_when_repeated
from fxckpt.upstream.ops.cudnn_rnn import CUDNN_RNN

aten = torch.ops.aten

FUSED = [
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", FUSED, ids=str)
def test_attention_draws_where_it_drops(op: Any) -> None:
    assert not draws_random_numbers(op, (), {})
    assert not draws_random_numbers(op, (), {"dropout_p": 0.0})
    assert draws_random_numbers(op, (), {"dropout_p": 0.1})


def test_by_place() -> None:
    efficient = aten._scaled_dot_product_efficient_attention.default
    assert draws_random_numbers(efficient, (None, None, None, None, True, 0.1), {})
    assert not draws_random_numbers(efficient, (None, None, None, None, True, 0.0), {})


@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash"])
def test_backward_is_given_the_seed(name: str) -> None:
    op = getattr(aten, f"_scaled_dot_product_{name}_attention_backward").default
    assert not draws_random_numbers(op, (), {"dropout_p": 0.1})


def test_others() -> None:
    assert draws_random_numbers(aten.native_dropout.default, (None, 0.1, True), {})
    assert draws_random_numbers(aten.bernoulli.default, (None,), {})
    assert not draws_random_numbers(aten.add.Tensor, (None, None), {})


def test_additions_in_any_order() -> None:
    op = aten.scatter_add.default
    assert may_differ_when_repeated(op, (), {}, "cuda")
    assert not may_differ_when_repeated(op, (), {}, "cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not may_differ_when_repeated(op, (), {}, "cuda")
    assert may_differ_when_repeated(aten.grid_sampler_2d_backward.default, (), {}, "cuda")
    torch.use_deterministic_algorithms(True)
    assert not may_differ_when_repeated(aten.grid_sampler_2d_backward.default, (), {}, "cuda")


def test_only_transposed_convolutions() -> None:
    def given(transposed: bool) -> tuple[Any, ...]:
        return (None, None, None, [1], [0], [1], transposed, [0], 1)

    assert may_differ_when_repeated(aten.convolution.default, given(True), {}, "cuda")
    assert not may_differ_when_repeated(aten.convolution.default, given(False), {}, "cuda")


def test_a_recurrent_layer_whose_dropout_has_a_state() -> None:
    def given(dropout: float) -> tuple[Any, ...]:
        return (None, [], 4, None, None, None, 2, 8, 0, 2, False, dropout, True, False, [], None)

    assert may_differ_when_repeated(CUDNN_RNN, given(0.3), {}, "cuda")
    assert not may_differ_when_repeated(CUDNN_RNN, given(0.0), {}, "cuda")
