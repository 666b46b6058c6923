"""`optimize` of functions: whatever they compute is one step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt
from fxckpt import api
from fxckpt.errors import FxckptError
from fxckpt.module.stand_in import planner_of

ROW = "the graph is the model, or it says so"


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = (nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16)) for _ in range(4))
    return nn.Sequential(*blocks)


GLOBAL = layers(9)
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


class Trainer:
    """No module, but it has some."""

    def __init__(self) -> None:
        self.student, self.teacher = layers(0), layers(1).requires_grad_(False)
        self.parts = {"head": nn.Linear(16, 4)}

    def loss(self, batch: Tensor, *, weight: float = 1.0) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch)
        found = self.student(batch)
        heads: Tensor = self.parts["head"](found)
        return F.mse_loss(found, target) * weight + heads.square().mean()

    def parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.parts["head"].parameters()]


def closure() -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    model = layers()

    def loss(batch: Tensor) -> Tensor:
        y: Tensor = model(batch) * model(batch * 0.5)  # two forwards of one model
        return y.mean()

    return loss, list(model.parameters())


def of_method() -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    trainer = Trainer()
    return trainer.loss, trainer.parameters()


def partial() -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        y: Tensor = model(batch)
        return F.cross_entropy(y, y.detach().argmax(1))

    model = layers()
    return functools.partial(loss, model), list(model.parameters())


def of_globals() -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    def loss(batch: Tensor) -> Tensor:
        y: Tensor = GLOBAL(batch)
        return y.square().mean()

    return loss, list(GLOBAL.parameters())


def of_optimized() -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    model = layers()
    inner = fxckpt.optimize(model, 1.0)

    def loss(batch: Tensor) -> Tensor:
        y: Tensor = inner(batch)
        return y.square().mean()

    return loss, list(model.parameters())


def far_away() -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    model = layers()
    held: Any = [[[[[[[[model]]]]]]]]

    def loss(batch: Tensor) -> Tensor:
        y: Tensor = held[0][0][0][0][0][0][0][0](batch)
        return y.square().mean()

    return loss, list(model.parameters())


FUNCTIONS = {
    "a closure that calls a model twice": closure,
    "a method of an object with two models and a head": of_method,
    "a partial": partial,
    "a function of a global model": of_globals,
    "a function of an optimized model": of_optimized,
    "a function of a model that is far away": far_away,
}


def left_by(function: Callable[..., Tensor], parameters: list[nn.Parameter], *args: Any) -> list[Tensor | None]:
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(3)
    loss = function(*args)
    loss.backward()
    return [loss.detach(), *(p.grad for p in parameters), torch.get_rng_state()]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.works(ROW, *FUNCTIONS)
def test_a_step_of_a_function(name: str) -> None:
    function, parameters = FUNCTIONS[name]()
    expected = left_by(function, parameters, X)
    planned = fxckpt.optimize(function, "1GB", solver="min_memory", cost_model="estimate")
    for _ in range(2):
        found = left_by(planned, parameters, X)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)
        assert [a is None for a in found] == [a is None for a in expected]
    plan = api.plan_of(planned)
    assert plan.schedule.repeats()
    assert fxckpt.plain(planned) is function


def test_the_peak_of_a_function_with_its_loss_is_within_the_budget() -> None:
    trainer = Trainer()
    planned = fxckpt.optimize(trainer.loss, 0.7, cost_model="estimate")
    for _ in range(2):
        planned(X).backward()
    measured = fxckpt.measure(planned, X)
    plan = api.plan_of(planned)
    assert plan.predicted.peak_bytes <= plan.budget_bytes
    assert measured.peak_bytes <= plan.budget_bytes
    assert fxckpt.measure(trainer.loss, X).peak_bytes > measured.peak_bytes


def test_a_report_names_the_modules_by_the_variables_that_hold_them() -> None:
    planned = fxckpt.optimize(Trainer().loss, 0.8, cost_model="estimate", example_inputs=(X,))
    planner = planner_of(cast(Any, planned).module)
    assert planner is not None
    assert planner.latest is not None
    paths = {given.path for given in planner.latest.profile.joint.roles.inputs}
    assert {"student.0.0.weight", "teacher.3.3.bias", "parts_head.weight"} <= paths


def test_plans_for_functions_without_running() -> None:
    loss, _ = closure()
    plan = fxckpt.plan(loss, 0.8, example_inputs=(X,), cost_model="estimate")
    assert plan.predicted.peak_bytes <= plan.budget_bytes
    assert str(fxckpt.advise(loss, example_inputs=(X,), cost_model="estimate"))
    assert fxckpt.pareto(loss, example_inputs=(X,), cost_model="estimate").timelines


def test_arguments_of_functions_and_what_they_are_called() -> None:
    trainer = Trainer()
    planned = fxckpt.optimize(trainer.loss, "1GB", cost_model="estimate")
    assert planned.__name__ == "loss"
    torch.manual_seed(0)
    expected = trainer.loss(X, weight=0.5)
    torch.manual_seed(0)
    assert torch.equal(planned(X, weight=0.5), expected)
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(planned(X, weight=0.5), expected)


def test_a_planned_function_is_planned_anew_where_it_is_given_again() -> None:
    loss, parameters = closure()
    again = fxckpt.optimize(fxckpt.optimize(loss, 1.0), "1GB", solver="min_memory", cost_model="estimate")
    expected, found = left_by(loss, parameters, X), left_by(again, parameters, X)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)
    assert fxckpt.plain(again) is loss


@pytest.mark.usefixtures("untraceable")
@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
def test_where_dynamo_traces_nothing() -> None:
    for make in (closure, of_method, partial):
        function, parameters = make()
        expected = left_by(function, parameters, X)
        found = left_by(fxckpt.optimize(function, "1GB", cost_model="estimate"), parameters, X)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)
    function, _ = far_away()
    with pytest.warns(fxckpt.PlanBypassedWarning, match="neither parameters nor arguments"):
        fxckpt.optimize(function, "1GB")(X).backward()


@pytest.mark.usefixtures("untraceable")
@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
def test_a_model_that_is_not_found_beside_one_that_is() -> None:
    near = layers(0)
    far, _ = far_away()

    def loss(batch: Tensor) -> Tensor:
        y: Tensor = near(batch)
        return y.mean() + far(batch)

    def call() -> Any:
        return fxckpt.optimize(loss, "1GB")(X)

    with pytest.raises(fxckpt.CaptureError):
        call()


def test_verify_checks_functions() -> None:
    loss, parameters = closure()
    expected = left_by(loss, parameters, X)
    found = left_by(fxckpt.optimize(loss, "1GB", verify=True, cost_model="estimate"), parameters, X)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)


def test_a_function_is_no_copy() -> None:
    loss, _ = closure()
    planned: Any = fxckpt.optimize(loss, "1GB")
    with pytest.raises(FxckptError, match="can't be copied"):
        copy.deepcopy(planned.module)


def test_a_benchmark_of_functions() -> None:
    loss, _ = closure()
    planned = fxckpt.optimize(loss, 0.8, cost_model="estimate")
    assert "the same to the last bit" in str(fxckpt.benchmark(loss, planned, example_inputs=(X,), runs=2))
