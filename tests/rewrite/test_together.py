"""Both halves of a convolution's backward as one call: the same bits, within the peak, and verified."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import fxckpt
from benchmarks.models.cases import case as case_named
from benchmarks.models.training import assert_same_bits, assert_same_step, measured_peak_bytes, run_step
from fxckpt.errors import VerificationError
from fxckpt.module.stand_in import planner_of
from fxckpt.pipeline import Compiled
from fxckpt.rewrite.backends.python.together import results_of
from fxckpt.rewrite.verify import verify
from fxckpt.upstream.allocator import peak_allocated_bytes
from fxckpt.upstream.dispatch import plain_execution

CPU = torch.device("cpu")
BACKWARD = torch.ops.aten.convolution_backward.default

FORMS: dict[str, tuple[Any, ...]] = {
    "small": ((2, 1, 1, 1), (1, 1, 3, 3), 1, 1, 1, False, 1),
    "usual": ((2, 4, 16, 16), (8, 4, 3, 3), 1, 1, 1, False, 1),
    "strided": ((4, 16, 24, 24), (32, 16, 3, 3), 2, 1, 1, False, 1),
    "1x1": ((4, 16, 24, 24), (32, 16, 1, 1), 1, 0, 1, False, 1),
    "depthwise": ((2, 8, 20, 20), (8, 1, 3, 3), 1, 1, 1, False, 8),
    "grouped and dilated": ((2, 8, 20, 20), (8, 4, 3, 3), 1, 2, 2, False, 2),
    "transposed": ((2, 8, 10, 10), (8, 4, 2, 2), 2, 0, 1, True, 1),
    "one dimension": ((2, 4, 64), (8, 4, 3), 1, 1, 1, False, 1),
    "three dimensions": ((2, 2, 8, 8, 8), (4, 2, 3, 3, 3), 1, 1, 1, False, 1),
}
"""Sizes of input and weight, stride, padding, dilation, whether transposed, groups."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_call_for_both_halves_gives_their_bits_in_their_memory(form: str, channels_last: bool) -> None:
    x_sizes, w_sizes, stride, padding, dilation, transposed, groups = FORMS[form]
    torch.manual_seed(0)
    x, weight, dims = torch.randn(x_sizes), torch.randn(w_sizes), len(x_sizes) - 2
    if channels_last and dims == 2:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    rest = ([stride] * dims, [padding] * dims, [dilation] * dims, transposed, [0] * dims, groups)
    with torch.no_grad(), plain_execution():
        grad = torch.randn_like(torch.convolution(x, weight, None, *rest))
        biases = [w_sizes[1] * groups if transposed else w_sizes[0]]

        def called(*mask: bool) -> list[Any]:
            return [t for t in BACKWARD(grad, x, weight, biases, *rest, list(mask)) if t is not None]

        def workspace_bytes(*mask: bool) -> int:
            results_bytes: int = sum(t.untyped_storage().nbytes() for t in called(*mask))
            return peak_allocated_bytes(lambda: called(*mask), CPU) - results_bytes

        halves = (True, False, False), (False, True, True)
        apart = [t for mask in halves for t in called(*mask)]
        for ours, theirs in zip(called(True, True, True), apart, strict=True):
            assert_same_bits(ours, theirs, form)
        assert workspace_bytes(True, True, True) <= max(workspace_bytes(*mask) for mask in halves)


def compiled_of(model: nn.Module) -> Compiled:
    planner = planner_of(model)
    assert planner is not None
    assert planner.latest is not None
    return planner.latest


@pytest.mark.parametrize("name", ["resnet", "unet", "dense"])
@pytest.mark.parametrize("budget", [1.0, 0.85])
def test_steps_have_the_same_bits_and_the_predicted_peak(name: str, budget: float) -> None:
    case = case_named(name)
    model, args, kwargs = case.build()
    optimized = fxckpt.optimize(copy.deepcopy(model), budget, example_inputs=args, example_kwargs=kwargs)
    compiled = compiled_of(optimized)
    together = [n for n in compiled.program.emitted.backward.nodes if n.target is results_of]
    assert together or budget < 1
    expected = run_step(model, args, kwargs, case.loss)
    assert_same_step(run_step(optimized, args, kwargs, case.loss), expected)
    optimized.zero_grad()
    peak_bytes = measured_peak_bytes(optimized, case, args, kwargs)
    assert peak_bytes <= compiled.plan.timeline.peak_bytes


def test_code_calls_once_for_both() -> None:
    case = case_named("resnet")
    model, args, kwargs = case.build()
    compiled = compiled_of(fxckpt.optimize(model, 1.0, example_inputs=args, example_kwargs=kwargs))
    code = compiled.program.executable.modules[1].code
    both = len(re.findall(r"convolution_backward_default\(.*\[True, True, False\]\)", code))
    assert both == sum(n.target is results_of for n in compiled.program.emitted.backward.nodes) > 0


@pytest.mark.parametrize("spoil", ["mask", "half"])
def test_verification_sees_a_call_that_is_not_for_both(spoil: str) -> None:
    case = case_named("resnet")
    model, args, kwargs = case.build()
    compiled = compiled_of(fxckpt.optimize(model, 1.0, example_inputs=args, example_kwargs=kwargs))
    executable = compiled.program.executable
    verify(compiled.profile, compiled.plan.timeline, executable)
    second = next(n for n in executable.emitted.backward.nodes if n.target is results_of)
    first: Any = second.args[0]
    if spoil == "mask":
        first.args = (*first.args[:-1], [True, False, False])
    else:
        second.args = (first, *second.args[1:-1], [False, False, True])
    with pytest.raises(VerificationError):
        verify(compiled.profile, compiled.plan.timeline, executable)
