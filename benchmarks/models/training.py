"""One training step and all that it leaves behind, to compare bit by bit; and its peak as the allocator saw it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.models.cases import Case

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Step:
    """What one step leaves: loss, gradients and buffers by name, gradients of inputs, state of the generator."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    input_gradients: tuple[Tensor | None, ...]
    buffers: dict[str, Tensor]
    random_state: Tensor


def run_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss, *, seed: int = 7) -> Step:
    """A training step from a fixed seed. Gradients are copies: the step can run again."""
    torch.manual_seed(seed)
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    for x in inputs:
        x.grad = None
    value = loss(model(*args, **kwargs))
    value.backward()
    return Step(
        loss=value.detach().clone(),
        gradients={name: _copy(p.grad) for name, p in model.named_parameters()},
        input_gradients=tuple(_copy(x.grad) for x in inputs),
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
        random_state=_random_state(),
    )


def _random_state() -> Tensor:
    """The states of all generators in use, one after another."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
    return torch.cat([torch.get_rng_state(), *on_gpus])


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()


def plain_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss, *, seed: int = 7) -> Step:
    """The step of the plain model, on a copy of it."""
    return run_step(copy.deepcopy(model), args, kwargs, loss, seed=seed)


def assert_same_bits(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Equal in every bit; NaN equals NaN."""
    assert (found is None) == (expected is None), f"{what}: {found} instead of {expected}"
    if found is None or expected is None:
        return
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    if torch.equal(found, expected):
        return
    same = (found == expected) | ((found != found) & (expected != expected))
    worst = (found.double() - expected.double()).abs().max().item()
    assert same.all(), f"{what}: {(~same).sum()} of {same.numel()} elements differ, by up to {worst:.3g}"


def assert_same_step(found: Step, expected: Step) -> None:
    """Loss, gradients, buffers and random-number state are equal bit by bit."""
    assert_same_bits(found.loss, expected.loss, "loss")
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_same_bits(found.gradients[name], gradient, f"gradient of {name}")
    for number, (ours, theirs) in enumerate(zip(found.input_gradients, expected.input_gradients, strict=True)):
        assert_same_bits(ours, theirs, f"gradient of input {number}")
    assert found.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert_same_bits(found.buffers[name], buffer, f"buffer {name}")
    assert torch.equal(found.random_state, expected.random_state), "the random-number generator is in another state"


def measured_peak_bytes(model: nn.Module, case: Case, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The most bytes that one step allocates at any time, beside what is there before it [B]."""
    torch.manual_seed(7)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as measured:
        outputs = model(*args, **kwargs)
        case.loss(outputs).backward()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def clear_gradients(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def allocate_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient of zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
