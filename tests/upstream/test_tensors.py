"""Copies of tensors keep what a step can tell apart; ops reach the kernels that they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxckpt.upstream.dispatch import (
    backward_keeps_graph,
    is_traced,
    plain_execution,
    really_computed,
    when_backward_ends,
)
from fxckpt.upstream.tensors import copies, is_view, storage_key, version_of


def test_copies_share_memory_where_the_originals_do() -> None:
    base = torch.arange(12.0)
    given = [base, base.view(3, 4).T, base[2:7:2], torch.ones(3), base]
    made = copies(given)
    assert [storage_key(x) == storage_key(made[0]) for x in made] == [True, True, True, False, True]
    assert made[4] is made[0]
    for found, expected in zip(made, given, strict=True):
        assert torch.equal(found, expected)
        assert (found.stride(), found.storage_offset()) == (expected.stride(), expected.storage_offset())
        assert storage_key(found) != storage_key(expected)
    made[0].zero_()
    assert not made[1].any()
    assert base.any()


@pytest.mark.parametrize("flags", ["plain", "conjugate", "negative", "requires grad"])
def test_copies_keep_flags(flags: str) -> None:
    x = torch.complex(torch.rand(3), torch.rand(3))
    given = {
        "plain": x,
        "conjugate": x.conj(),
        "negative": x.conj().imag,
        "requires grad": torch.rand(3, requires_grad=True),
    }[flags]
    (made,) = copies([given])
    assert torch.equal(made, given)
    found = made.is_conj(), made.is_neg(), made.requires_grad, made.is_leaf
    assert found == (given.is_conj(), given.is_neg(), given.requires_grad, given.is_leaf)


def test_versions_and_views() -> None:
    x = torch.zeros(3)
    view = x[1:]
    before = version_of(x)
    view.add_(1)
    assert version_of(x) == version_of(view) == before + 1
    assert (is_view(view), is_view(x), storage_key(3)) == (True, False, None)


def test_plain_execution_is_not_recorded() -> None:
    x = torch.rand(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), plain_execution():
        product, view = x @ x, x.view(2, 8)
    assert (product.dtype, product.requires_grad, is_view(view)) == (torch.float32, False, False)


def test_really_computed_within_modes() -> None:
    with FakeTensorMode():
        with really_computed():
            real = torch.ones(3)
        assert not is_traced()
    assert real.tolist() == [1, 1, 1]


@pytest.mark.parametrize("retain", [False, True])
def test_what_backward_tells(retain: bool) -> None:
    told: list[Any] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(_: Any, gradient: Tensor) -> Tensor:
            told.append(backward_keeps_graph())
            when_backward_ends(lambda: told.append("ended"))
            return gradient * 2

    x = torch.ones(3, requires_grad=True)
    y = Asks.apply(x)  # type: ignore[no-untyped-call]
    x.register_hook(lambda _: told.append("gradient"))
    y.sum().backward(retain_graph=retain)
    assert told == [retain, "gradient", "ended"]
