"""Architectures of transformers train in half of the plain peak, with the plain model's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxckpt
from benchmarks.models.architectures import ARCHITECTURES, Architecture, step_at
from benchmarks.models.cases import own_loss
from benchmarks.models.training import assert_same_step, plain_step, run_step
from fxckpt import api
from fxckpt.errors import CaptureError, CheckpointingBypassedWarning

QUICK = ("Qwen3", "Mixtral", "SqueezeBERT", "LLaVA")
REFUSED = {
    "DeBERTa-v2": "nonzero",
    "Longformer": "nonzero",
    "Switch Transformers": "nonzero",
    "ViLT": "reads the value",
}
"""What can't be captured, and a part of the reason that is given."""


def named(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.works("transformers", *QUICK)
def test_some_at_half_of_the_plain_peak(name: str) -> None:
    optimized, inputs = step_at(named(name), 0.5)
    predicted, measured = api.plan_of(optimized).predicted.peak_bytes, fxckpt.measure(optimized, **inputs).peak_bytes
    assert measured == pytest.approx(predicted, rel=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name not in QUICK], ids=str)
def test_all_others_within_the_plain_peak(architecture: Architecture) -> None:
    if architecture.name in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[architecture.name]):
            step_at(architecture, 1.0)
    else:
        step_at(architecture, 1.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.works("transformers", "`gradient_checkpointing_enable()` (bypassed, with a warning)")
def test_gradient_checkpointing_that_is_on_already(use_reentrant: bool) -> None:
    model, inputs = named("Llama").build()
    without = fxckpt.plan(model, "1GB", example_kwargs=inputs, solver="save_all", cost_model="reference")
    enable: Any = model.gradient_checkpointing_enable
    enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    expected = plain_step(model, (), inputs, own_loss)
    optimized = fxckpt.optimize(model, "1GB", solver="min_memory", cost_model="reference")
    names = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
    off = next(name for name in names if hasattr(model, name))
    with pytest.warns(CheckpointingBypassedWarning, match=rf"\.{off}\(\)"):
        assert_same_step(run_step(optimized, (), inputs, own_loss), expected)
    with pytest.warns(CheckpointingBypassedWarning):
        plan = fxckpt.plan(model, "1GB", example_kwargs=inputs, solver="save_all", cost_model="reference")
    assert len(plan.graph.ops) == len(without.graph.ops)


def test_a_model_that_computes_something_else_when_it_is_compiled_is_captured_as_it_is_in_eager() -> None:
    class Asks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            return y.exp() if torch.compiler.is_compiling() else y.sin()

    model, x = Asks(), torch.ones(2, 4)
    assert torch.equal(fxckpt.optimize(model, "1GB")(x), model(x))
