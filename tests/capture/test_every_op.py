"""Each op in torch's own database of operators, with torch's samples, in several layouts: bit for bit as in eager.

Ops that can't be captured are refused, with the reason; for a few, torch has another formula where values are unknown.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations as database
from torch.utils import _pytree as pytree

import fxckpt
from benchmarks.models.training import assert_same_bits
from fxckpt.errors import CaptureError
from fxckpt.upstream.ops.layout import layout_of

OPS = {
    op.name + f".{op.variant_test_name}".rstrip("."): op
    for op in database.op_db
    if torch.float32 in op.supported_dtypes("cpu") and not op.name.startswith(("jiterator", "sparse"))
}

ROUNDED = {"masked_fill", "masked.prod", "pca_lowrank", "prod", "svd_lowrank"}
"""Ops for whose gradients torch has another formula where values are unknown."""

UNDEFINED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
"""Ops whose results are what was in memory before."""

REASONS = re.compile("reads the value of a tensor|whose shape depends on values|backward_token")
"""Why ops are refused."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as given": torch.clone,
    "transposed": lambda x: x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d),
}
LEAST_DIMS = {"as given": 0, "transposed": 2, "channels last": 4}


class Applied(nn.Module):
    """An op as a model of its tensors; what else it is given is a part of it."""

    def __init__(self, op: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.op, self.spec = op, spec
        self.fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves = list(self.fixed)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        given, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return [x for x in pytree.tree_leaves(self.op(given, *args, **kwargs)) if isinstance(x, Tensor)]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A leaf with the values of `x`, in another layout where it has enough dims for that."""
    fits = LEAST_DIMS[layout] <= x.dim() and (layout != "channels last" or x.dim() <= 5)
    return LAYOUTS[layout if fits else "as given"](x.detach()).requires_grad_(x.requires_grad)


def samples(name: str, layout: str, most: int) -> Iterator[tuple[Applied, list[Tensor]]]:
    """Torch's samples of an op, as models and their inputs."""
    op = OPS[name]
    torch.manual_seed(0)
    for sample in itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd), most):
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(x.layout is not torch.strided for x in tensors):
            continue
        if max(x.dim() for x in tensors) >= LEAST_DIMS[layout]:
            yield Applied(op.op, leaves, spec), [laid_out(x, layout) for x in tensors]


def step(model: nn.Module, tensors: list[Tensor]) -> list[Tensor | None]:
    """Outputs, and gradients of the inputs."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
    torch.manual_seed(0)
    outputs = model(*inputs)
    ends = [x for x in outputs if x.requires_grad]
    if ends:
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(ends, [torch.rand(x.shape, generator=generator).to(x.dtype) for x in ends])
    return [*outputs, *(x.grad for x in inputs)]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None], *, rounded: bool = False) -> None:
    assert len(found) == len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is None or theirs is None or not rounded:
            assert_same_bits(ours, theirs, f"result {number}")
            assert ours is None or theirs is None or layout_of(ours) == layout_of(theirs), f"layout of {number}"
        else:
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def eager_step(model: nn.Module, tensors: list[Tensor]) -> list[Tensor | None] | None:
    """What eager torch gives, if it takes the sample and gives the same twice."""
    try:
        first, second = step(model, tensors), step(model, tensors)
        assert_same(first, second)
    except Exception:
        return None
    return first


@contextlib.contextmanager
def without_own_seeds() -> Iterator[None]:
    """Let random ops draw on, instead of seeding the generator themselves, which is refused."""
    with mock.patch.object(database, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs)):
        yield


def check(name: str, layout: str, most: int) -> None:
    with without_own_seeds():
        for model, tensors in samples(name, layout, most):
            expected = None if name in UNDEFINED else eager_step(model, tensors)
            if expected is None:
                continue
            try:
                found = step(fxckpt.optimize(model, "1TB", solver="min_memory", cost_model="reference"), tensors)
            except CaptureError as refusal:
                if REASONS.search(str(refusal)):
                    continue
                raise
            assert_same(found, expected, rounded=name.partition(".with")[0] in ROUNDED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(OPS)[::6])
def test_first_sample_of_every_sixth(name: str) -> None:
    check(name, "as given", 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.works(
    "layers and ops", f"each of {len(OPS)} operators in torch's database, by torch's samples, in several layouts"
)
def test_samples(name: str, layout: str) -> None:
    check(name, layout, 3)
