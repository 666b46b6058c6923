"""A budget is for a step: several forwards before a backward, of one model or of several, stay within it together."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.training import assert_same_bits
from fxckpt.errors import OverBudgetWarning
from fxckpt.module.stand_in import planner_of
from fxckpt.pipeline import Compiled
from fxckpt.upstream.allocator import peak_allocated_bytes
from tests.support.warned import LOSS_OUTSIDE, no_other_warning

MIB = 2**20
SLACK_BYTES = 64 * 1024
"""What a loss of a few rows takes outside of the model."""

StepOf = Callable[..., Any]


pytestmark = pytest.mark.filterwarnings(LOSS_OUTSIDE)


def tower(width: int = 64, layers: int = 12, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.GELU())])


def rows(*seeds: int) -> list[Tensor]:
    return [torch.randn(1024, 64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def resident_bytes(*models: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def peak_of(step: Callable[[], None], *models: nn.Module, inputs: list[Tensor]) -> int:
    given = resident_bytes(*models) + sum(x.numel() * x.element_size() for x in inputs)
    gradients = sum(p.grad.numel() * 4 for model in models for p in model.parameters() if p.grad is not None)
    return given + gradients + peak_allocated_bytes(step, torch.device("cpu"))


def compiled_of(module: nn.Module) -> list[Compiled]:
    planner = planner_of(module)
    assert planner is not None
    return planner.compiled()


def small(*outputs: Tensor) -> list[Tensor]:
    """A few numbers of each output: what is outside of the model takes next to nothing."""
    return [x[:8].square().mean() for x in outputs]


def siamese(net: nn.Module, a: Tensor, b: Tensor) -> None:
    one, two = small(net(a), net(b))
    (one * two).backward()


def triplet(net: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> None:
    F.triplet_margin_loss(net(a)[:8], net(b)[:8], net(c)[:8]).backward()


def first_loss_first(net: nn.Module, a: Tensor, b: Tensor) -> None:
    one, two = small(net(a), net(b))
    one.backward()
    two.backward()


def one_by_one(net: nn.Module, a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        small(net(x))[0].backward()


STEPS: dict[str, tuple[StepOf, int]] = {
    "siamese": (siamese, 2),
    "triplet": (triplet, 3),
    "first loss first": (first_loss_first, 2),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("share", [0.45, 0.7])
@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.works("training loops", "several forwards before their backwards share the budget")
def test_calls_of_a_step_share_the_budget(name: str, share: float, keeps_gradients: bool) -> None:
    step, count = STEPS[name]
    model, inputs = tower(), rows(*range(count))
    plain = copy.deepcopy(model)

    def clear(net: nn.Module) -> None:
        net.zero_grad(set_to_none=not keeps_gradients)

    step(plain, *inputs)
    clear(plain)
    plain_bytes = peak_of(lambda: step(plain, *inputs), plain, inputs=inputs)
    budget_bytes = int(share * plain_bytes)
    ours = fxckpt.optimize(model, budget_bytes, cost_model="reference", effort="fast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverBudgetWarning)  # the first step does not know what comes
        step(ours, *inputs)
    for _ in range(3):
        clear(ours)
        step(ours, *inputs)
    clear(ours)
    measured_bytes = peak_of(lambda: step(ours, *inputs), model, inputs=inputs)
    assert measured_bytes <= budget_bytes + SLACK_BYTES
    assert measured_bytes > 0.7 * budget_bytes  # and makes use of it
    clear(plain)
    step(plain, *inputs)
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same_bits(p.grad, q.grad, key)


def test_calls_that_are_not_outstanding_together_have_the_budget_each() -> None:
    model, inputs = tower(), rows(0, 1)
    ours = fxckpt.optimize(model, 0.6, cost_model="reference", effort="fast")
    for _ in range(3):
        one_by_one(ours, *inputs)
        ours.zero_grad(set_to_none=True)
    plans = [compiled.plan for compiled in compiled_of(ours)]
    assert all(plan.predicted.peak_bytes > 0.5 * plan.baseline.peak_bytes for plan in plans)


@pytest.mark.works("training loops", "two models in one step share it too")
def test_two_towers_share_the_budget() -> None:
    left, right, inputs = tower(seed=1), tower(seed=2), rows(0, 1)

    def step(one: nn.Module, two: nn.Module) -> None:
        a, b = one(inputs[0])[:8], two(inputs[1])[:8]
        (a * b).sum().backward()

    twins = copy.deepcopy(left), copy.deepcopy(right)
    step(*twins)
    for twin in twins:
        twin.zero_grad(set_to_none=True)
    plain_bytes = peak_of(lambda: step(*twins), *twins, inputs=inputs)
    budget_bytes = int(0.6 * plain_bytes)
    ours = [fxckpt.optimize(net, budget_bytes, cost_model="reference", effort="fast") for net in (left, right)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverBudgetWarning)
        step(*ours)
    for _ in range(2):
        for net in ours:
            net.zero_grad(set_to_none=True)
        step(*ours)
    for net in ours:
        net.zero_grad(set_to_none=True)
    assert peak_of(lambda: step(*ours), left, right, inputs=inputs) <= budget_bytes + SLACK_BYTES
    for net, twin in zip((left, right), twins, strict=True):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert_same_bits(p.grad, q.grad, "gradient")


def test_steps_that_alternate_are_told_apart() -> None:
    """As a discriminator's steps, with two calls, and a generator's, with one."""
    model, inputs = tower(), rows(0, 1)
    budget_bytes = int(0.45 * peak_of(lambda: siamese(copy.deepcopy(model), *inputs), model, inputs=inputs))
    ours = fxckpt.optimize(model, budget_bytes, cost_model="reference", effort="fast")

    def alone() -> None:
        small(ours(inputs[0]))[0].backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverBudgetWarning)
        for _ in range(3):
            siamese(ours, *inputs)
            ours.zero_grad(set_to_none=True)
            alone()
            ours.zero_grad(set_to_none=True)
    for _ in range(2):
        both = peak_of(lambda: siamese(ours, *inputs), model, inputs=inputs)
        ours.zero_grad(set_to_none=True)
        one = peak_of(alone, model, inputs=inputs[:1])
        ours.zero_grad(set_to_none=True)
        assert both <= budget_bytes + SLACK_BYTES
        assert one <= budget_bytes + SLACK_BYTES
        assert one > 0.7 * budget_bytes  # alone a call has it all


def test_a_budget_that_the_step_can_not_keep_is_said_once() -> None:
    model, inputs = tower(), rows(0, 1, 2)
    floor = fxckpt.pareto(model, example_inputs=(inputs[0],), cost_model="reference").floor.predicted.peak_bytes
    ours = fxckpt.optimize(model, floor + 2**16, cost_model="reference", effort="fast")
    with pytest.warns(OverBudgetWarning, match=r"take .* together, .* over the budget"):
        triplet(ours, *inputs)
    ours.zero_grad(set_to_none=True)
    with pytest.warns(OverBudgetWarning, match=r"take .* together, .* over the budget"):
        triplet(ours, *inputs)  # planned together now
    ours.zero_grad(set_to_none=True)
    with no_other_warning():
        triplet(ours, *inputs)


def test_a_forward_that_is_dropped_holds_nothing() -> None:
    model, (a, b) = tower(), rows(0, 1)
    ours = fxckpt.optimize(model, 0.5, cost_model="reference", effort="fast")
    ours(a)  # no backward
    gc.collect()
    with no_other_warning():
        for x in (b, a):
            small(ours(x))[0].backward()


def test_a_failed_forward_holds_nothing() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tower(layers=6)

        def forward(self, x: Tensor) -> Tensor:
            if (x.sum() == 0).any():
                raise ValueError("nothing there")
            return self.net(x)  # type: ignore[no-any-return]

    (a,) = rows(0)
    ours = fxckpt.optimize(Picky(), 0.6, cost_model="reference", effort="fast")
    small(ours(a))[0].backward()
    with pytest.raises(ValueError, match="nothing there"):
        ours(torch.zeros_like(a))
    with no_other_warning():
        small(ours(a))[0].backward()


def test_what_was_planned_together_goes_with_the_model() -> None:
    model, inputs = tower(layers=4), rows(0, 1)
    ours = fxckpt.optimize(model, 0.6, cost_model="reference", effort="fast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverBudgetWarning)
        for _ in range(3):
            siamese(ours, *inputs)
    kept: list[weakref.ref[Any]] = [weakref.ref(p) for p in model.parameters()]
    kept += [weakref.ref(c.program) for c in compiled_of(ours)]
    del ours, model
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_a_model_that_is_gone_while_its_call_is_outstanding() -> None:
    a, b = rows(0, 1)
    ours = fxckpt.optimize(tower(layers=4), "1GB", cost_model="reference", effort="fast")
    result = ours(a)
    del ours
    gc.collect()
    other = fxckpt.optimize(tower(layers=4), "1GB", cost_model="reference", effort="fast")
    small(other(b))[0].backward()
    small(result)[0].backward()
