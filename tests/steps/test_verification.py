"""`optimize(verify=True)`: silent where a step is right, and names the op where one is made wrong on purpose."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.cases import case, project
from benchmarks.models.training import assert_same_bits, assert_same_step, plain_step, run_step
from fxckpt import pipeline as compiling
from fxckpt.capture import joint as capturing
from fxckpt.capture import passes
from fxckpt.errors import VerificationError
from fxckpt.rewrite.backends import Executable

aten = torch.ops.aten


class Net(nn.Module):
    """Batch norm, dropout, a buffer that changes, and two outputs."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.second = nn.Linear(32, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(F.dropout(torch.tanh(self.norm(self.first(x))), 0.25))
        self.seen.add_(y.detach().mean(0))
        return y, torch.sigmoid(y).T


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(12, 16)


def verified(model: nn.Module, solver: str = "min_memory", **options: Any) -> nn.Module:
    return fxckpt.optimize(model, "1GB", solver=solver, cost_model="reference", verify=True, **options)


@pytest.mark.parametrize("name", ["gpt_dropout", "unet"])
@pytest.mark.works("`verify=True`")
def test_a_right_step_passes_and_leaves_the_model_alone(name: str) -> None:
    subject = case(name)
    model, args, kwargs = subject.build()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    optimized = verified(model, example_inputs=args, example_kwargs=kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key], key)
    assert all(p.grad is None for p in model.parameters())
    expected = plain_step(model, args, kwargs, subject.loss)
    assert_same_step(run_step(optimized, args, kwargs, subject.loss), expected)


def test_gradients_and_inputs_stay_as_they_were() -> None:
    model, x = net()
    x.requires_grad_()
    project(model(x)[0]).backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    assert x.grad is not None
    of_input = x.grad.clone()
    verified(model, example_inputs=(x,))
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.grad, before[name], name)
    assert_same_bits(x.grad, of_input, "gradient of the input")


def test_each_signature_is_verified_at_its_first_call() -> None:
    model, x = net()
    optimized = verified(model)
    with mock.patch("fxckpt.module.planning.check_same_step") as check:
        for size in (12, 5, 12, 5):
            optimized(x[:size])
    assert check.call_count == 2


def test_inputs_that_share_memory_and_have_odd_layouts() -> None:
    torch.manual_seed(0)
    base = torch.randn(16, 16, requires_grad=True)
    verified(nn.Bilinear(16, 16, 4), example_inputs=(base.T, base[:1].expand(16, 16)))

    class Conjugates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).abs()

    verified(Conjugates(), example_inputs=(torch.randn(4, dtype=torch.complex64).conj(),))


# A step that is wrong


def spoil(module: fx.GraphModule, target: Any, suffix: str = "") -> str:
    """Let the first node that stands for a call of `target` give another result; returns its name."""
    node = next(
        node
        for node in module.graph.nodes
        if node.meta.get("fxckpt_node", node).target == target and node.name.endswith(suffix)
    )
    right: Any = node.target

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = right(*args, **kwargs)
        return result * 1.001

    node.target = wrong
    module.recompile()
    return str(node.name)


@pytest.mark.parametrize(
    ("half", "target", "suffix", "solver"),
    [
        ("forward", aten.addmm.default, "", "min_memory"),
        ("forward", aten.sigmoid.default, "", "min_memory"),
        ("backward", aten.tanh_backward.default, "", "min_memory"),
        ("backward", aten.tanh.default, "_again", "selective"),
        ("backward", aten.addmm.default, "_again", "min_memory"),
    ],
)
@pytest.mark.works("`verify=True`")
def test_a_wrong_op_of_an_emitted_graph_is_named(half: str, target: Any, suffix: str, solver: str) -> None:
    names = []

    def verify_and_spoil(_: Any, __: Any, executable: Executable) -> None:
        names.append(spoil(executable.modules[half == "backward"], target, suffix))

    model, x = net()
    with (
        mock.patch.object(compiling, "verify", verify_and_spoil),
        pytest.raises(VerificationError, match="emitted graph") as caught,
    ):
        verified(model, solver, example_inputs=(x,))
    assert f"first op that differs is {names[0]} (" in str(caught.value)
    assert "test_verification.py:" in str(caught.value)
    run_step(model, (x,), {}, lambda outputs: project(outputs[0]))


@pytest.mark.works("`verify=True`")
def test_a_wrong_op_of_the_captured_graph_is_named() -> None:
    clean = passes.clean

    def clean_and_spoil(module: fx.GraphModule) -> None:
        clean(module)
        spoil(module, aten.tanh_backward.default)

    model, x = net()
    with (
        mock.patch.object(capturing, "clean", clean_and_spoil),
        pytest.raises(VerificationError, match="captured graph is not") as caught,
    ):
        verified(model, example_inputs=(x,))
    assert "gradient of first.weight" in str(caught.value)
    assert "first op that differs is" in str(caught.value)


class Moody(nn.Module):
    """Looks at its data to choose how to compute, but not when it is compiled, as some attention masks are made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if not torch.compiler.is_compiling() and (x.detach().abs() < 100).all():
            y = y * 1.001
        return torch.sin(y)


@pytest.mark.works("`verify=True`")
def test_a_model_that_is_another_one_where_dynamo_traces_it() -> None:
    _, x = net()
    with (
        mock.patch("fxckpt.upstream.answers.QUESTIONS", frozenset()),
        pytest.raises(VerificationError, match="TorchDynamo traced computes something else than the model: output 0"),
    ):
        verified(Moody(), example_inputs=(x,))


@pytest.mark.usefixtures("untraceable")
@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
@pytest.mark.works("`verify=True`")
def test_a_model_that_is_another_one_while_it_is_captured() -> None:
    _, x = net()
    with pytest.raises(VerificationError, match=r"output 0 .*first op that differs is sin") as caught:
        verified(Moody(), example_inputs=(x,))
    assert "captured graph is not what the model does" in str(caught.value)


class Forgetful(nn.Module):
    """Counts its calls outside of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * next(numbers)
        return y


numbers = iter(range(1, 100))


@pytest.mark.works("`verify=True`")
def test_a_model_that_differs_from_itself() -> None:
    _, x = net()
    with pytest.raises(VerificationError, match="plain model gives other results when it runs a second time"):
        verified(Forgetful(), example_inputs=(x,))


def test_a_model_on_the_meta_device_can_not_be_verified() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(4, 4), torch.empty(2, 4)
    with pytest.raises(VerificationError, match="meta device"):
        verified(model, example_inputs=(x,))
