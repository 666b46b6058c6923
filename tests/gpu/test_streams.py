"""On a CUDA device backward runs in autograd's thread of the device, on the stream that forward ran on."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxckpt
from benchmarks.models.training import assert_same_bits
from fxckpt.errors import OverBudgetWarning
from fxckpt.module.ledger import ledger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

_NOTED: list[tuple[str, int, int]] = []
"""What ran: forward or backward, on which stream, in which thread."""


def _note(what: str) -> None:
    _NOTED.append((what, torch.cuda.current_stream().cuda_stream, threading.get_ident()))


@torch.library.custom_op("fxckpt_streams::noted", mutates_args=())
def noted(x: Tensor) -> Tensor:
    _note("forward")
    return x * 2


@torch.library.custom_op("fxckpt_streams::noted_backward", mutates_args=())
def noted_backward(x: Tensor) -> Tensor:
    _note("backward")
    return x * 2


@noted.register_fake
@noted_backward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


noted.register_autograd(lambda _, gradient: noted_backward(gradient))


class Noted(nn.Module):
    """Layers between which it is noted where they run."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = noted(layer(x).tanh())
        return x


def build() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Noted().cuda(), torch.randn(256, 1024, device="cuda")
    optimized = fxckpt.optimize(copy.deepcopy(model), 2**40, solver="min_memory", example_inputs=(x,))
    torch.cuda.synchronize()
    return model, optimized, x


@contextmanager
def busy(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work is queued on a stream, behind which whatever ran elsewhere would be too early."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        yield


def assert_same_gradients(optimized: nn.Module, model: nn.Module) -> None:
    torch.cuda.synchronize()
    for ours, theirs in zip(optimized.parameters(), model.parameters(), strict=True):
        assert_same_bits(ours.grad, theirs.grad, "gradient")


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "stream of its own"])
@pytest.mark.parametrize("loss_on_it", [False, True], ids=["loss outside", "loss on it"])
def test_backward_runs_on_forwards_stream(own_stream: bool, loss_on_it: bool) -> None:
    model, optimized, x = build()
    stream = torch.cuda.Stream() if own_stream else None
    places = []
    for module in (model, optimized):
        _NOTED.clear()
        with busy(stream):
            y = module(x)
            loss = y.square().mean() if loss_on_it else None
        if loss is None:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
            loss = y.square().mean()
        loss.backward()
        places.append({(what, where) for what, where, _ in _NOTED})
        threads = {what: thread for what, _, thread in _NOTED}
        assert threads["forward"] == threading.get_ident()
        assert threads["backward"] != threading.get_ident()
        torch.cuda.synchronize()
    assert places[0] == places[1]
    assert len({where for _, where in places[1]}) == 1
    assert_same_gradients(optimized, model)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")  # parameters belong to one of them
def test_steps_on_two_streams_at_once() -> None:
    model, optimized, x = build()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for module in (model, optimized):
        losses = []
        for number, stream in enumerate(streams):
            with busy(stream):
                losses.append(module(x * (number + 1)).square().mean())
        for loss, stream in zip(losses, streams, strict=True):
            with torch.cuda.stream(stream):
                loss.backward()
                torch.cuda.synchronize()
    assert_same_gradients(optimized, model)


def test_backward_from_other_outputs_is_planned_in_the_thread_of_the_device() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.other = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x).relu()
            return self.one(y), self.other(y)

    torch.manual_seed(0)
    model, x = TwoHeads().cuda(), torch.randn(16, 64, device="cuda")
    optimized = fxckpt.optimize(copy.deepcopy(model), 2**40)
    for _ in range(2):
        for module in (model, optimized):
            module.zero_grad()
            module(x)[0].square().mean().backward()
        assert_same_gradients(optimized, model)


@pytest.mark.parametrize("verify", [False, True])
def test_a_model_with_a_checkpoint_of_its_own(verify: bool) -> None:
    """What it repeats in backward runs in the thread of the device, while the caller's waits."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(lambda z: self.one(z).tanh(), x, use_reentrant=False)
            z: Tensor = self.other(y)
            return z

    torch.manual_seed(0)
    model, x = Checkpointed().cuda(), torch.randn(16, 64, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = fxckpt.optimize(copy.deepcopy(model), 2**40, verify=verify)
        for module in (model, optimized):
            module(x).square().mean().backward()
    assert_same_gradients(optimized, model)


@pytest.mark.xfail(strict=True, reason="the thread of a device does not have the context of the caller on torch 2.11")
def test_a_planned_call_in_backward_belongs_to_the_step() -> None:
    inner = fxckpt.optimize(nn.Sequential(nn.Linear(64, 64), nn.Tanh()).cuda(), 2**40)
    x = torch.randn(16, 64, device="cuda", requires_grad=True)
    used = []

    def call(x: Tensor) -> Tensor:
        used.append((ledger(), threading.get_ident()))
        y: Tensor = inner(x)
        return y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverBudgetWarning)
        checkpoint(call, x, use_reentrant=True).sum().backward()
    (one, here), (other, there) = used
    assert here != there
    assert one is other


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_and_modes_of_the_caller(autocast: bool) -> None:
    model, optimized, x = build()
    for module in (model, optimized):
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            loss = module(x).float().square().mean()
        loss.backward()
    assert_same_gradients(optimized, model)
