"""What the tests of other packages share: train plain and optimized from the same seeds, compare, measure a step.

A plan counts as used where nothing warns and the measured peak of a step, the loss included, is within a budget that
the plain step exceeds. Neither asks fxckpt what it did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fxckpt
from benchmarks.models.training import assert_same_bits
from fxckpt.api import plan_of
from fxckpt.capture.structure import take_apart
from fxckpt.errors import OverBudgetWarning, PlanBypassedWarning
from fxckpt.upstream.allocator import peak_allocated_bytes
from fxckpt.upstream.tensors import memory_bytes

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[Any, int], Tensor]
"""From a model and the number of a step to what is differentiated."""

WARM = 2
"""Steps before peaks are measured: the first is planned, the second may be planned for other outputs."""


@dataclass
class Trained:
    """What training leaves: losses and gradients step by step, the state at the end, peaks of warm steps [B]."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)


class Recorder:
    """Runs the steps of one training and records what they leave."""

    def __init__(self, *models: nn.Module) -> None:
        """`models` are those whose parameters count as resident; the first is the one that is trained."""
        self.models, self.trained = models, Trained()

    def step(self, run: Callable[[], Tensor], inputs: Any = ()) -> Tensor:
        """Run forward and backward, which `run` does; returns its loss."""
        losses: list[Tensor] = []
        if len(self.trained.losses) < WARM:
            losses.append(run())
        else:
            resident_bytes = held_bytes(self.models, inputs)
            allocated_bytes = peak_allocated_bytes(lambda: losses.append(run()), torch.device("cpu"))
            self.trained.peaks.append(resident_bytes + allocated_bytes)
        self.trained.losses.append(losses[0].detach().clone())
        self.trained.gradients.append({name: copied(p.grad) for name, p in self.models[0].named_parameters()})
        return losses[0]

    def done(self) -> Trained:
        """What was recorded, with the state that the model is left in."""
        self.trained.state = {name: value.clone() for name, value in self.models[0].state_dict().items()}
        return self.trained


def copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()


def held_bytes(models: tuple[nn.Module, ...], inputs: Any) -> int:
    """What is there before a step: parameters, buffers, gradients that are allocated, inputs [B]."""
    held = [*take_apart(inputs)[0]]
    for model in models:
        held += [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return memory_bytes(held)


def train(model: nn.Module, loss_of: Loss, *, steps: int = 4, autocast: bool = False, inputs: Any = ()) -> Trained:
    """A plain loop: AdamW, gradients set to None at each step; `inputs` are those that are there all the time."""
    torch.manual_seed(1)
    recorder = Recorder(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for number in range(steps):

        def run(number: int = number) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, number)
            loss.backward()
            return loss

        optimizer.zero_grad()
        recorder.step(run, inputs)
        optimizer.step()
    return recorder.done()


def assert_same_training(ours: Trained, plain: Trained) -> None:
    """Losses, gradients of every step, and the state at the end, bit by bit."""
    assert len(ours.losses) == len(plain.losses) > WARM
    for number, (found, expected) in enumerate(zip(ours.losses, plain.losses, strict=True)):
        assert_same_bits(found, expected, f"loss of step {number}")
    for number, (own, others) in enumerate(zip(ours.gradients, plain.gradients, strict=True)):
        assert own.keys() == others.keys()
        for name, gradient in others.items():
            assert_same_bits(own[name], gradient, f"gradient of {name} in step {number}")
    assert ours.state.keys() == plain.state.keys()
    for name, value in plain.state.items():
        assert_same_bits(ours.state[name], value, name)


def assert_within(budget_bytes: int, ours: Trained, plain: Trained, *, outside_bytes: int = 0) -> None:
    """Every measured step is within the budget, which the plain model's steps are not.

    `outside_bytes` is what the step takes for a loss outside of the model, where no plan counts it [B].
    """
    budget_bytes += outside_bytes
    assert ours.peaks
    assert max(ours.peaks) <= budget_bytes, f"peaks {ours.peaks} B, the budget is {budget_bytes} B"
    assert max(plain.peaks) > budget_bytes, f"plain peaks {plain.peaks} B are within {budget_bytes} B, too"


@contextmanager
def planned() -> Iterator[None]:
    """No call in here runs without its plan, and no step over its budget."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in seen if issubclass(w.category, (PlanBypassedWarning, OverBudgetWarning))]
    assert not said, said


def check(
    build: Callable[[], Model],
    loss_of: Loss,
    budget: float = 0.7,
    *,
    outside_bytes: int = 0,
    methods: tuple[str, ...] = ("forward",),
    **options: Any,
) -> None:
    """Train a model plain and optimized, its `methods` planned: the same bits, each step within the budget."""
    torch.manual_seed(0)
    expected = train(build(), loss_of, **options)
    torch.manual_seed(0)
    ours = fxckpt.optimize(build(), budget, effort="fast", methods=methods)
    with planned():
        found = train(ours, loss_of, **options)
    assert_same_training(found, expected)
    assert_within(plan_of(ours).budget_bytes, found, expected, outside_bytes=outside_bytes)
