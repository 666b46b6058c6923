"""Backward runs where forward ran, in whatever thread: what threads have of their own is found there too."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxckpt
from benchmarks.models.cases import CASES, Case
from benchmarks.models.cases import case as case_named
from benchmarks.models.training import assert_same_bits, assert_same_step, run_step
from fxckpt.errors import RuntimeContractError
from fxckpt.module import ledger as ledgers
from fxckpt.module.ledger import ledger
from fxckpt.runtime.place import Place
from fxckpt.upstream.dispatch import backwards_context

CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward runs in another thread than its caller's, as on devices that have threads."""
    plain = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            return other.submit(plain, *args, **kwargs).result()

    monkeypatch.setattr(torch.autograd, "backward", backward)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", CASES[:8], ids=repr)
def test_a_backward_in_another_thread_has_the_same_bits(case: Case) -> None:
    model, args, kwargs = case.build()
    optimized = fxckpt.optimize(copy.deepcopy(model), 0.9, example_inputs=args, example_kwargs=kwargs)
    expected = run_step(model, args, kwargs, case.loss)
    assert_same_step(run_step(optimized, args, kwargs, case.loss), expected)


@pytest.mark.usefixtures("elsewhere")
def test_repeated_draws_in_another_thread() -> None:
    case = case_named("gpt_dropout")
    model, args, kwargs = case.build()
    optimized = fxckpt.optimize(copy.deepcopy(model), 0.9, solver="min_memory")
    expected = run_step(model, args, kwargs, case.loss)
    assert_same_step(run_step(optimized, args, kwargs, case.loss), expected)


class TwoHeads(nn.Module):
    """Two outputs, of which a backward may start from one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x).relu()
        return self.one(y), self.other(y)


@pytest.mark.usefixtures("elsewhere")
def test_another_thread_plans_for_other_outputs() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(4, 8)
    optimized = fxckpt.optimize(copy.deepcopy(model), 2**40)
    for _ in range(2):
        for module in (model, optimized):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                one, _ = module(x)
            one.sum().backward()
        for ours, theirs in zip(optimized.parameters(), model.parameters(), strict=True):
            assert_same_bits(ours.grad, theirs.grad, "gradient")


@pytest.mark.usefixtures("elsewhere")
def test_errors_and_hooks_of_another_thread_arrive() -> None:
    torch.manual_seed(0)
    optimized, x = fxckpt.optimize(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 2**40), torch.randn(4, 8)
    seen: list[Tensor] = []
    next(optimized.parameters()).register_hook(seen.append)
    loss = optimized(x).sum()
    loss.backward()
    assert len(seen) == 1
    with pytest.raises(RuntimeContractError, match="second time"):
        loss.backward()


def test_verification_runs_backward_in_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds locks that a thread of a device would wait for."""
    plain, multithreaded = torch.autograd.backward, list[bool]()

    def backward(*args: Any, **kwargs: Any) -> None:
        multithreaded.append(torch._C._is_multithreading_enabled())
        plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    optimized = fxckpt.optimize(model, 2**40, verify=True, example_inputs=(torch.randn(2, 8),))
    assert multithreaded
    assert not any(multithreaded)
    multithreaded.clear()
    optimized(torch.randn(2, 8)).sum().backward()
    assert multithreaded == [True]


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_what_links_stages_does_not_depend_on_defaults(setting: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8)
    optimized = fxckpt.optimize(copy.deepcopy(model), 2**40)

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        before = torch.get_default_dtype()
        with torch.device("meta") if setting == "device" else contextlib.nullcontext():
            torch.set_default_dtype(torch.float64 if setting == "dtype" else before)
            try:
                yield
            finally:
                torch.set_default_dtype(before)

    for module in (model, optimized):
        with changed():
            loss = module(x).sum()
        loss.backward()
    for ours, theirs in zip(optimized.parameters(), model.parameters(), strict=True):
        assert_same_bits(ours.grad, theirs.grad, "gradient")


def test_the_place_is_the_first_device_that_is_not_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.of([CPU, CPU]) == Place(CPU)
    assert Place.of([]) == Place(CPU)
    assert Place.of([CPU, GPU, GPU, CPU]) == Place(GPU)
    assert Place(CPU).link().device == CPU

    entered: list[Any] = []

    @contextlib.contextmanager
    def stream(which: Any) -> Iterator[None]:
        entered.append(which)
        yield
        entered.remove(which)

    module = SimpleNamespace(current_stream=lambda device: SimpleNamespace(device=device), stream=stream)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    place = Place.of([GPU, OTHER_GPU, GPU])
    assert place.device == GPU
    with place.entered():
        assert [stream.device for stream in entered] == [OTHER_GPU]
    assert not entered


def test_a_thread_of_a_device_has_the_ledger_of_who_called_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    own, context = ledger(), contextvars.copy_context()
    with ThreadPoolExecutor(1) as device:
        assert device.submit(ledger).result() is not own
        monkeypatch.setattr(ledgers, "backwards_context", lambda: context)
        assert device.submit(ledger).result() is own
        monkeypatch.setattr(ledgers, "backwards_context", contextvars.Context)
        assert device.submit(ledger).result() is not own


def test_backward_tells_the_context_of_its_caller() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    found: list[str | None] = []

    def look(_: Tensor) -> None:
        context = backwards_context()
        assert context is not None
        found.append(context.get(variable))

    def called() -> None:
        variable.set("here")
        x = torch.ones(2, requires_grad=True)
        x.register_hook(look)
        x.sum().backward()

    thread = threading.Thread(target=called)
    thread.start()
    thread.join()
    assert found == ["here"]
    assert backwards_context() is None


def test_a_checkpoint_around_a_planned_module_sits_beside_what_is_outstanding() -> None:
    """The call that is repeated in backward has the ledger that the step has."""
    used: list[Any] = []
    inner = fxckpt.optimize(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 2**40)
    x = torch.randn(4, 8, requires_grad=True)

    def noted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            used.append(ledger())
            return run(*args)

        return call

    checkpoint(noted(inner), x, use_reentrant=True).sum().backward()
    assert len(used) == 2
    assert used[0] is used[1]
