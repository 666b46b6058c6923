"""The optimized module stands in for the model everywhere."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.cases import MLP, case, project
from benchmarks.models.training import assert_same_step, plain_step, run_step
from fxckpt import api
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.errors import (
    BudgetError,
    CaptureError,
    InfeasibleBudgetError,
    OverBudgetWarning,
    PlanMismatchError,
    RuntimeContractError,
    SolverError,
)
from fxckpt.module.stand_in import planner_of

X = torch.linspace(-1, 1, 16 * 32).reshape(16, 32)


class Net(nn.Module):
    """A model with a method, a plain attribute, a buffer and dropout."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.dropout = nn.Dropout(0.25)
        self.second = nn.Linear(64, 8)
        self.register_buffer("count", torch.zeros(()))
        self.config = {"width": 64}

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        if self.training:
            self.count.add_(1)
        y: Tensor = self.second(self.dropout(torch.tanh(self.first(x)))) * scale
        return y if shift is None else y + shift

    def describe(self) -> str:
        return f"a net of width {self.config['width']} that is {'training' if self.training else 'evaluated'}"


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def thrifty(model: nn.Module, **options: Any) -> nn.Module:
    """The model under a plan that recomputes whatever it can."""
    return fxckpt.optimize(model, "1GB", solver="min_memory", **options)


def check(model: nn.Module, *args: Any, loss: Callable[[Any], Tensor] = project, **kwargs: Any) -> None:
    """A step of `model` optimized leaves what a step of `model` leaves."""
    expected = plain_step(model, args, kwargs, loss)
    assert_same_step(run_step(thrifty(model), args, kwargs, loss), expected)


# What it is


@pytest.mark.works("inputs, outputs, state")
def test_it_is_the_model_to_whoever_asks() -> None:
    model = net()
    optimized = thrifty(model, example_inputs=(X,))
    assert isinstance(optimized, Net)
    assert optimized.describe() == "a net of width 64 that is training"
    assert optimized.config is model.config
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert [n for n, _ in optimized.named_modules()] == [n for n, _ in model.named_modules()]
    for (name, ours), (same_name, theirs) in zip(optimized.named_parameters(), model.named_parameters(), strict=True):
        assert name == same_name
        assert ours is theirs
    for our_buffer, buffer in zip(optimized.buffers(), model.buffers(), strict=True):
        assert our_buffer is buffer
    assert inspect.signature(optimized.forward) == inspect.signature(model.forward)
    assert inspect.signature(type(optimized).forward) == inspect.signature(Net.forward)


def test_a_forward_that_is_set_wraps_the_planned_one() -> None:
    optimized = thrifty(net())
    planned = optimized.forward
    calls = []

    def wrapper(*args: Any) -> Any:
        calls.append(args)
        return planned(*args)

    optimized.forward = wrapper
    assert_same_step(run_step(optimized, (X,), {}, project), plain_step(net(), (X,), {}, project))
    assert len(calls) == 1
    assert fxckpt.graphs(optimized)
    del optimized.forward
    optimized(X)
    assert len(calls) == 1


def test_the_model_itself_stays_plain() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimized = thrifty(model, example_inputs=(X,))
    assert type(model) is Net
    assert type(model).__call__ is nn.Module.__call__
    assert "forward" not in vars(model)
    assert optimized is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert_same_step(run_step(model, (X,), {}, project), plain_step(net(), (X,), {}, project))


def test_planning_changes_nothing() -> None:
    model = net()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    api.plan(model, 1.0, example_inputs=(X,))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model).keys() == vars(net()).keys()


def test_a_model_on_the_meta_device_is_planned() -> None:
    with torch.device("meta"):
        model, x = MLP(8, 1024), torch.empty(65_536, 1024)
    plan = api.plan(model, 0.8, example_inputs=(x,))
    assert plan.predicted.peak_bytes <= plan.budget_bytes < plan.baseline.peak_bytes
    assert plan.predicted.recompute_us > 0


def test_optimizing_twice_is_optimizing_once() -> None:
    optimized = thrifty(thrifty(net()))
    assert_same_step(run_step(optimized, (X,), {}, project), plain_step(net(), (X,), {}, project))


# Modes, copies


@pytest.mark.works("inputs, outputs, state")
def test_train_and_eval() -> None:
    model, reference = net(), net()
    optimized = thrifty(model)
    for training in (True, False, True):
        optimized.train(training)
        reference.train(training)
        assert model.training is training
        assert isinstance(optimized, Net)
        assert optimized.describe() == reference.describe()
        for m in (optimized, reference):
            m.zero_grad()
        assert_same_step(run_step(optimized, (X,), {}, project), run_step(reference, (X,), {}, project))


def test_only_a_submodule_in_eval_mode() -> None:
    model = net()
    optimized = thrifty(model)
    run_step(optimized, (X,), {}, project)
    optimized.zero_grad()
    model.dropout.eval()
    reference = net()
    reference.dropout.eval()
    reference.count.add_(1)
    assert_same_step(run_step(optimized, (X,), {}, project), run_step(reference, (X,), {}, project))


def test_another_type_of_number() -> None:
    optimized = thrifty(net())
    run_step(optimized, (X,), {}, project)
    optimized.zero_grad()
    returned = optimized.to(torch.float64)
    assert isinstance(returned, Net)
    reference = net().to(torch.float64)
    reference.count.add_(1)
    assert_same_step(run_step(returned, (X.double(),), {}, project), run_step(reference, (X.double(),), {}, project))


@pytest.mark.works("inputs, outputs, state")
def test_a_deep_copy_is_optimized_and_independent() -> None:
    optimized = thrifty(net(), example_inputs=(X,))
    twin = copy.deepcopy(optimized)
    assert type(twin) is type(optimized)
    assert twin.get_parameter("first.weight") is not optimized.get_parameter("first.weight")
    run_step(optimized, (X,), {}, project)
    assert twin.get_parameter("first.weight").grad is None
    assert twin.count == 0
    assert_same_step(run_step(twin, (X,), {}, project), plain_step(net(), (X,), {}, project))


@pytest.mark.works("inputs, outputs, state")
def test_pickling() -> None:
    optimized = thrifty(net(), example_inputs=(X,))
    twin = pickle.loads(pickle.dumps(optimized))
    assert isinstance(twin, Net)
    assert_same_step(run_step(twin, (X,), {}, project), plain_step(net(), (X,), {}, project))
    fxckpt.print_plan(twin, file=io.StringIO())


def test_saving_the_whole_module_with_torch() -> None:
    file = io.BytesIO()
    torch.save(thrifty(net()), file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert_same_step(run_step(twin, (X,), {}, project), plain_step(net(), (X,), {}, project))


@pytest.mark.works("inputs, outputs, state")
def test_state_dicts_go_both_ways() -> None:
    source, target = thrifty(net()), thrifty(Net())
    target.load_state_dict(source.state_dict())
    assert_same_step(run_step(target, (X,), {}, project), plain_step(net(), (X,), {}, project))


# Signatures


@pytest.mark.works("inputs, outputs, state")
def test_a_new_shape_is_captured_anew() -> None:
    optimized = thrifty(net())
    for batch in (16, 3, 16, 7):
        x = X[:batch].clone()
        reference = net()
        reference.count.copy_(optimized.get_buffer("count"))
        optimized.zero_grad()
        assert_same_step(run_step(optimized, (x,), {}, project), run_step(reference, (x,), {}, project))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, 2.0), {}),
        ((X,), {"scale": 3.0}),
        ((), {"x": X}),
        ((X,), {"shift": torch.ones(8)}),
        ((X, 2.0), {"shift": None}),
    ],
)
def test_arguments_that_are_no_tensors(args: Any, kwargs: Any) -> None:
    optimized = thrifty(net(), example_inputs=(X,))
    assert_same_step(run_step(optimized, args, kwargs, project), plain_step(net(), args, kwargs, project))


@pytest.mark.works("inputs, outputs, state")
def test_values_of_arguments_are_part_of_the_signature() -> None:
    optimized = thrifty(net().eval())
    assert torch.equal(optimized(X, 2.0), net().eval()(X, 2.0))
    assert torch.equal(optimized(X, 3.0), net().eval()(X, 3.0))


def test_strides_and_types_of_inputs() -> None:
    check(net(), X.T.contiguous().T)
    check(nn.Sequential(nn.Linear(32, 4)), X[:, :32].expand(16, 32))
    check(nn.Embedding(10, 4), torch.tensor([1, 2, 2]))


@pytest.mark.works("precision", "autocast outside of the model, turned on and off")
def test_autocast_is_part_of_the_signature() -> None:
    optimized, reference = thrifty(net()), net()
    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for m in (optimized, reference):
                m.zero_grad()
            ours = run_step(optimized, (X,), {}, lambda y: project(y.float()))
            theirs = run_step(reference, (X,), {}, lambda y: project(y.float()))
        assert_same_step(ours, theirs)


# Without gradients


class Picky(nn.Module):
    """Decides on the value of a tensor: runs, but can't be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if y.sum() > 0:  # this line
            return y * 2
        return y


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.works("inputs, outputs, state")
def test_without_gradients_the_plain_forward_runs(context: Callable[[], Any]) -> None:
    model = Picky()
    optimized = fxckpt.optimize(model, "1GB")
    with context():
        assert torch.equal(optimized(X), model(X))


def test_a_frozen_model_runs_plain() -> None:
    model = Picky().requires_grad_(False)
    optimized = fxckpt.optimize(model, "1GB")
    assert torch.equal(optimized(X), model(X))


# Outputs


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: list[Tensor]
    note: str = "fine"
    missing: Tensor | None = None


Pair = namedtuple("Pair", "first second")


class Returns(nn.Module):
    """Returns what `form` makes of two tensors."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        a = torch.tanh(self.layer(x))
        return self.form(a, F.relu(a))


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda a, b: (a, b), lambda y: project(y[0] + y[1])),
    "list": (lambda a, b: [a, b], lambda y: project(y[0] + y[1])),
    "nested": (lambda a, b: ((a, [b, None]), {"k": (a, 3, "s")}), lambda y: project(y[0][0] + y[0][1][0])),
    "dict": (lambda a, b: {"a": a, 2: b}, lambda y: project(y["a"] * y[2])),
    "ordered dict": (lambda a, b: OrderedDict(z=a, a=b), lambda y: project(y["z"] * y["a"])),
    "named tuple": (Pair, lambda y: project(y.first * y.second)),
    "dataclass": (lambda a, b: Answer(a, [b, a]), lambda y: project(y.logits * y.hidden[0])),
    "same tensor twice": (lambda a, b: (a, a, b), lambda y: project(y[0] * y[1])),
    "with constants": (lambda a, b: (a, 1, 2.5, "text", None, True, b), lambda y: project(y[0] + y[6])),
    "undifferentiated": (lambda a, b: (a, b.detach(), b > 0, b.argmax()), lambda y: project(y[0])),
    "views": (lambda a, b: (a, a[:, :3], a.T, b.view(-1)), lambda y: project(y[1]) + project(y[2]) + project(y[3])),
}


def same_structure(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad
        assert ours.stride() == theirs.stride()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same_structure(ours[key], theirs[key])
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same_structure(a, b)
    elif dataclasses.is_dataclass(theirs):
        same_structure(vars(ours), vars(theirs))
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.works("inputs, outputs, state", *FORMS)
def test_outputs_keep_their_structure(name: str) -> None:
    form, loss = FORMS[name]
    torch.manual_seed(0)
    model = Returns(form)
    same_structure(thrifty(model)(X), model(X))
    check(model, X, loss=loss)


def test_outputs_that_share_memory_know_of_each_other() -> None:
    """A change in place of one of them is seen or refused, never overlooked."""
    model = thrifty(Returns(lambda a, _: (a, a[:, :3], a.T, a.detach())))
    whole, part, turned, detached = model(X)
    assert {x.untyped_storage().data_ptr() for x in (part, turned, detached)} == {whole.untyped_storage().data_ptr()}
    for view in part, turned:
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            view.mul_(2)
    with torch.no_grad():
        detached.mul_(2)
    assert torch.equal(whole, detached)
    with pytest.raises(RuntimeContractError, match="output of the model was changed in place"):
        project(whole).backward()


@pytest.mark.works("transformers", "outputs of the model's own type")
def test_outputs_of_transformers() -> None:
    model, args, kwargs = case("bert").build()
    model.eval()
    ours, theirs = thrifty(model)(*args, **kwargs), model(*args, **kwargs)
    assert type(ours) is type(theirs)
    assert list(ours.keys()) == list(theirs.keys())
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours[0], ours.loss)


@pytest.mark.works("inputs, outputs, state")
def test_identity_of_outputs_and_inputs() -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.layer(x)
            return y, x, self.layer.weight

    model = Passes()
    y, x, weight = thrifty(model)(X)
    assert x is X
    assert weight is model.layer.weight
    assert torch.equal(y, model(X)[0])


# What can't be captured


@pytest.mark.works("errors")
def test_control_flow_on_values_is_named_with_its_line() -> None:
    lines, start = inspect.getsourcelines(Picky.forward)
    number = start + next(i for i, line in enumerate(lines) if "# this line" in line)
    with pytest.raises(CaptureError, match=rf"test_module\.py:{number}\b.*torch\.where"):
        fxckpt.optimize(Picky(), "1GB", example_inputs=(X,))
    with pytest.raises(CaptureError, match=rf"test_module\.py:{number}\b"):
        fxckpt.optimize(Picky(), "1GB")(X)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last


class Unfit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[x[:, 0].nonzero()[:, 0]]
        return y


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("make", [Picky, Unfit])
@pytest.mark.works("errors")
def test_a_failed_optimize_leaves_the_model_as_it_was(make: type[nn.Module]) -> None:
    _fails_without_a_trace(make)


@pytest.mark.usefixtures("untraceable")
@pytest.mark.parametrize("make", [Picky, Remembers, Unfit])
def test_a_failed_capture_by_a_call_leaves_the_model_as_it_was(make: type[nn.Module]) -> None:
    _fails_without_a_trace(make)


def _fails_without_a_trace(make: type[nn.Module]) -> None:
    model = make()
    before = dict(vars(model))
    weight = model.get_parameter("layer.weight").clone()
    state = torch.get_rng_state()
    with pytest.raises(CaptureError):
        fxckpt.optimize(model, "1GB", example_inputs=(X,))
    assert type(model) is make
    assert vars(model) == before
    assert torch.equal(model.get_parameter("layer.weight"), weight)
    assert torch.equal(torch.get_rng_state(), state)
    model(X).sum().backward()


@pytest.mark.usefixtures("untraceable")
@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
def test_what_forward_prepares_when_it_first_runs_is_undone_after_capture() -> None:
    class Prepares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.calls: dict[str, int] = {}
            self.is_ready = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.is_ready:
                self.is_ready = True
                self.layer.register_forward_hook(lambda _, __, output: output * 2)
            self.calls["forward"] = self.calls.get("forward", 0) + 1
            y: Tensor = self.layer(x)
            return y

    model = Prepares()
    expected = plain_step(model, (X,), {}, project)
    optimized = thrifty(model, example_inputs=(X,))
    assert (model.calls, model.is_ready, len(model.layer._forward_hooks)) == ({}, False, 0)
    assert_same_step(run_step(optimized, (X,), {}, project), expected)


@pytest.mark.usefixtures("untraceable")
@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
@pytest.mark.parametrize("place", ["a dictionary", "a buffer", "an attribute"])
@pytest.mark.works("errors")
def test_where_dynamo_traces_nothing_a_tensor_that_forward_stores_is_refused_wherever_it_is(place: str) -> None:
    class Stores(nn.Module):
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.memory: dict[str, Tensor] = {}
            if place == "a buffer":
                self.register_buffer("last", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            if place == "a dictionary":
                self.memory["last"] = y
            else:
                self.last = y.detach().mean()
            return y

    with pytest.raises(CaptureError, match="stores a tensor in attribute 'last' of Stores"):
        fxckpt.optimize(Stores(), "1GB", example_inputs=(X,))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the model's own")])
@pytest.mark.works(
    "threads, processes, interrupts", "an exception or interrupt during capture leaves the model as it was"
)
def test_an_exception_during_capture_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = Raises()
    model.error = error
    with pytest.raises((CaptureError, KeyboardInterrupt)):
        fxckpt.optimize(model, "1GB", example_inputs=(X,))
    model.error = None
    check(model, X)


class OutOfRange(Picky):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unbind(5)[0]  # no such dim


class Asserts(Picky):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 7, "seven of them"
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "line"), [(OutOfRange, r"unbind\(5\)"), (Asserts, "assert x.shape")])
@pytest.mark.works("errors", "a fault of forward's is told with its line")
def test_a_fault_of_forward_is_told_with_its_line(make: type[nn.Module], line: str) -> None:
    with pytest.raises(CaptureError, match=line):
        fxckpt.optimize(make(), "1GB", example_inputs=(X,))


# Budgets, solvers, plans


@pytest.mark.parametrize("budget", ["1GB", "1GiB", 10**9, 1.0])
def test_forms_of_a_budget(budget: Any) -> None:
    plan = api.plan(net(), budget, example_inputs=(X,))
    expected = {"1GB": 10**9, "1GiB": 2**30, 10**9: 10**9, 1.0: plan.baseline.peak_bytes}[budget]
    assert plan.budget_bytes == expected


@pytest.mark.parametrize(
    "budget", ["", "much", "-1GB", 0, -5, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, [], None]
)
@pytest.mark.works("errors", "budgets that make no sense")
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(BudgetError):
        api.plan(net(), budget, example_inputs=(X,))
    with pytest.raises(BudgetError):
        fxckpt.optimize(net(), budget)(X)


def test_a_fraction_is_of_the_plain_peak() -> None:
    model, args, _ = case("gpt").build()
    plan = api.plan(model, 0.8, example_inputs=args)
    assert plan.budget_bytes == pytest.approx(0.8 * plan.baseline.peak_bytes, abs=1)


def test_a_reserve_counts_and_so_does_the_state_of_an_optimizer() -> None:
    model = net()
    peak_bytes = api.plan(model, "1GB", example_inputs=(X,)).predicted.peak_bytes
    reserved = api.plan(model, "1GB", example_inputs=(X,), reserve="1MB")
    assert reserved.predicted.peak_bytes == peak_bytes + 10**6
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    adam = torch.optim.AdamW(model.parameters())
    with_adam = api.plan(model, "1GB", example_inputs=(X,), optimizer=adam).predicted.peak_bytes - peak_bytes
    assert 2 * parameter_bytes <= with_adam <= 2 * parameter_bytes + 64 * len(list(model.parameters()))
    run_step(model, (X,), {}, project)
    adam.step()
    started = api.plan(model, "1GB", example_inputs=(X,), optimizer=adam, gradients="fresh")
    assert started.predicted.peak_bytes - peak_bytes == with_adam
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    assert api.plan(model, "1GB", example_inputs=(X,), optimizer=sgd, gradients="fresh").predicted.peak_bytes == (
        peak_bytes
    )


def test_gradients_that_are_allocated_count() -> None:
    model = net()
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    fresh = api.plan(model, "1GB", example_inputs=(X,), gradients="fresh")
    assert api.plan(model, "1GB", example_inputs=(X,)) == fresh
    run_step(model, (X,), {}, project)
    allocated = api.plan(model, "1GB", example_inputs=(X,))
    assert allocated.graph.gradients_allocated
    assert allocated.graph.allocated_gradient_bytes == parameter_bytes


def test_a_solver_of_ones_own() -> None:
    def mine(graph: Graph, budget_bytes: int) -> Schedule:
        assert budget_bytes == 10**9
        return plain(graph)

    plan = api.plan(net(), "1GB", example_inputs=(X,), solver=mine)
    assert plan.solver == "mine"
    assert plan.schedule.repeats() == {}


def test_a_solver_that_returns_nonsense() -> None:
    with pytest.raises(SolverError, match="wrong"):
        api.plan(net(), "1GB", example_inputs=(X,), solver=wrong)


def wrong(graph: Graph, budget_bytes: int) -> Schedule:
    return Schedule((budget_bytes,), graph.forward_count)


def test_a_solver_that_there_is_not() -> None:
    with pytest.raises(SolverError, match=r"'simplex'.*dp"):
        fxckpt.optimize(net(), "1GB", example_inputs=(X,), solver="simplex")


def test_a_plan_can_be_saved_and_applied() -> None:
    model, args, kwargs = case("gpt").build()
    expected = plain_step(model, args, kwargs, project)
    plan = api.plan(model, 0.8, example_inputs=args)
    plan = fxckpt.Plan.from_json(plan.to_json())
    optimized = fxckpt.optimize(model, plan=plan, example_inputs=args)
    assert_same_step(run_step(optimized, args, kwargs, project), expected)


def test_a_plan_over_the_budget_where_it_is_applied_says_so() -> None:
    plan = api.plan(net(), "1GB", example_inputs=(X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxckpt.optimize(net(), plan.predicted.peak_bytes, plan=plan, example_inputs=(X,))
    with pytest.warns(OverBudgetWarning, match="Plan here"):
        fxckpt.optimize(net(), plan.predicted.peak_bytes - 1, plan=plan, example_inputs=(X,))


@pytest.mark.works("errors")
def test_a_plan_for_another_graph() -> None:
    plan = api.plan(net(), "1GB", example_inputs=(X,))
    with pytest.raises(PlanMismatchError, match=plan.fingerprint):
        fxckpt.optimize(MLP(2, 32), plan=plan, example_inputs=(X,))
    with pytest.raises(PlanMismatchError):
        fxckpt.optimize(MLP(2, 32), plan=plan)(X)


@pytest.mark.works("errors")
def test_a_budget_below_the_floor_says_so_at_the_first_call_too() -> None:
    optimized = fxckpt.optimize(net(), "1KB")
    with pytest.raises(InfeasibleBudgetError):
        optimized(X)
    with pytest.raises(InfeasibleBudgetError):
        optimized(X)


@pytest.mark.works("inputs, outputs, state")
def test_a_module_without_parameters_that_require_grad() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    assert torch.equal(fxckpt.optimize(Doubles(), "1GB")(X), X * 2)


def test_a_printed_plan_is_the_same_each_time() -> None:
    texts = []
    for _ in range(2):
        model, args, _ = case("gpt").build()
        file = io.StringIO()
        fxckpt.print_plan(fxckpt.optimize(model, 0.8, example_inputs=args, cost_model="estimate"), file=file)
        texts.append(file.getvalue())
    assert texts[0] == texts[1]
    assert "blocks." in texts[0]
    assert "cases.py:" in texts[0]


# The emitted graphs


def test_the_graphs_show_what_is_repeated() -> None:
    subject = case("mlp")
    model, args, kwargs = subject.build()
    with pytest.raises(fxckpt.FxckptError, match="no plan"):
        fxckpt.graphs(model)
    optimized = fxckpt.optimize(model, 2**40, solver="min_memory")
    with pytest.raises(fxckpt.FxckptError, match="nothing is planned yet"):
        fxckpt.graphs(optimized)
    subject.loss(optimized(*args, **kwargs)).backward()
    graphs, plan = fxckpt.graphs(optimized), api.plan_of(optimized)
    repeats = plan.schedule.repeats()
    assert repeats
    for index, op in enumerate(plan.graph.ops):
        assert graphs.backward.code.count(f" {op.name}_again") >= bool(repeats.get(index))
    runs = {node.name: node.meta["fxckpt"]["runs"] for node in graphs.captured.graph.nodes if "fxckpt" in node.meta}
    assert runs == {op.name: 1 + repeats.get(index, 0) for index, op in enumerate(plan.graph.ops)}
    assert "yield" in graphs.backward.code
    assert "yield" not in graphs.forward.code


@pytest.mark.works("inputs, outputs, state", "a fraction as budget refers to the largest batch, so the last one fits")
@pytest.mark.parametrize("sizes", [(256, 256, 6, 256), (256, 300, 6, 2), (512, 1)])
def test_a_fraction_refers_to_the_largest_batch_seen(sizes: tuple[int, ...]) -> None:
    model = MLP(10, 64)
    with pytest.raises(InfeasibleBudgetError):  # alone the least of them would not fit
        fxckpt.plan(model, 0.6, example_inputs=(torch.randn(min(sizes), 64),), cost_model="reference")
    optimized = fxckpt.optimize(model, 0.6, cost_model="reference", effort="fast")
    planner = planner_of(optimized)
    assert planner is not None
    granted_bytes = 0
    for size in sizes:
        x = torch.randn(size, 64)
        whole = fxckpt.plan(model, "1GB", example_inputs=(x,), cost_model="reference", gradients="fresh")
        granted_bytes = max(granted_bytes, int(0.6 * whole.baseline.peak_bytes))
        project(optimized(x)).backward()
        optimized.zero_grad(set_to_none=True)
        assert all(compiled.plan.predicted.peak_bytes <= granted_bytes for compiled in planner.compiled())
