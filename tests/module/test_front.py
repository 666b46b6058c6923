"""The graph is the model, or it says so: what forward reads from Python, what it changes, and calls past a plan."""

from __future__ import annotations

import copy
import gc
import random
import threading
import warnings
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.cases import project
from benchmarks.models.training import assert_same_bits, assert_same_step, run_step
from fxckpt.errors import (
    CaptureError,
    PlanBypassedWarning,
    ReplanningWarning,
    UnguardedCaptureWarning,
)
from fxckpt.module.stand_in import planner_of


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ROW = "the graph is the model, or it says so"


def optimized(model: nn.Module, **options: Any) -> Any:
    return fxckpt.optimize(model, "1GB", solver="min_memory", cost_model="estimate", **options)


def plans_of(model: nn.Module) -> int:
    planner = planner_of(model)
    assert planner is not None
    return len(planner.compiled())


class Layers(nn.Module):
    """Layers, and a function of the module and its input as forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.function = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def same_steps(
    model: nn.Module,
    change: Callable[[Any, int], None] = lambda _, __: None,
    *,
    steps: int = 4,
    batch: int = 4,
    loss: Callable[[Any], Tensor] = project,
) -> Any:
    """Steps of a model and of its optimized twin leave the same; before each, both are changed."""
    twin = copy.deepcopy(model)
    ours = optimized(model)
    for step in range(steps):
        for one in (twin, ours):
            change(one, step)
        x = rows(batch, 8) + step
        for one in (twin, ours):
            random.seed(step)
            one.zero_grad()
        random.seed(step)
        expected = run_step(twin, (x.clone(),), {}, loss, seed=step)
        random.seed(step)
        assert_same_step(run_step(ours, (x.clone(),), {}, loss, seed=step), expected)
    return ours


# What forward reads from Python

SCALE = 1.0


def _global_scale(m: Any, x: Tensor) -> Any:
    return m.a(x).sin() * SCALE


READS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any], Callable[[Any, int], None]]] = {
    "a number": (lambda m, x: m.a(x).exp() / m.tau, {"tau": 1.0}, lambda m, i: setattr(m, "tau", 1 / (i + 1))),
    "a flag": (
        lambda m, x: m.b(m.a(x).detach() if m.stop else m.a(x)),
        {"stop": True},
        lambda m, i: setattr(m, "stop", i % 2 == 0),
    ),
    "a rate of dropout": (lambda m, x: m.drop(m.a(x)), {}, lambda m, i: setattr(m.drop, "p", 0.1 * i)),
    "a momentum": (lambda m, x: m.norm(m.a(x)), {}, lambda m, i: setattr(m.norm, "momentum", 0.1 * (i + 1))),
    "a dict of configuration": (
        lambda m, x: m.a(x) * m.config["scale"],
        {"config": {"scale": 1.0}},
        lambda m, i: m.config.update(scale=float(i)),
    ),
    "a list": (
        lambda m, x: sum((m.a(x) * f for f in m.factors), start=x),
        {"factors": [1.0]},
        lambda m, i: m.factors.append(float(i)),
    ),
    "a text": (
        lambda m, x: getattr(torch, m.kind)(m.a(x)),
        {"kind": "sin"},
        lambda m, i: setattr(m, "kind", ("sin", "cos")[i % 2]),
    ),
    "a function": (
        lambda m, x: m.act(m.a(x)),
        {"act": torch.sin},
        lambda m, i: setattr(m, "act", [F.gelu, F.relu][i % 2]),
    ),
    "a tensor in a dict": (
        lambda m, x: m.a(x) + m.held["x"],
        {"held": {"x": torch.ones(8)}},
        lambda m, i: m.held.update(x=torch.full((8,), float(i))),
    ),
    "a layer that is replaced": (
        lambda m, x: m.b(m.a(x)),
        {},
        lambda m, i: setattr(m, "b", nn.Identity() if i == 2 else m.b),
    ),
}


@pytest.mark.filterwarnings("ignore::fxckpt.errors.ReplanningWarning")
@pytest.mark.parametrize("name", READS)
@pytest.mark.works(ROW, f"what forward reads from Python and is changed later ({', '.join(READS)})")
def test_what_forward_reads_from_python_may_change(name: str) -> None:
    torch.manual_seed(0)
    forward, attributes, change = READS[name]
    same_steps(Layers(forward, **attributes), change)


def test_globals_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    same_steps(Layers(_global_scale), lambda _, i: monkeypatch.setitem(globals(), "SCALE", float(i + 1)))


def test_a_float_that_changes_becomes_an_input() -> None:
    torch.manual_seed(0)
    model = Layers(lambda m, x: m.a(x).sin() * m.tau, tau=1.0)
    ours = same_steps(model, lambda m, i: setattr(m, "tau", 1 / (i + 3)), steps=6)
    assert plans_of(ours) == 2


# What forward changes


def _center(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    m.mean = 0.9 * m.mean + 0.1 * x.mean(0).detach()
    return x - m.mean


def _count(m: Any, x: Tensor) -> Any:
    m.calls += 1
    m.seen["last"] = m.calls
    return m.a(x) * (1 + m.calls % 2)


def _clamp(m: Any, x: Tensor) -> Any:
    m.a.weight.data.clamp_(-0.1, 0.1)
    return m.a(x).sin()


def _normalize(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        m.a.weight.copy_(F.normalize(m.a.weight, dim=1))
    return m.b(m.a(x).sin())


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any]]] = {
    "a tensor attribute": (_center, {"mean": torch.zeros(8)}),
    "counters": (_count, {"calls": 0, "seen": {}}),
    "a parameter's data": (_clamp, {}),
    "a parameter, without gradients": (_normalize, {}),
}


@pytest.mark.filterwarnings("ignore::fxckpt.errors.ReplanningWarning")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.works(ROW, f"what forward changes ({', '.join(CHANGES)})")
def test_what_forward_changes_is_changed(name: str) -> None:
    torch.manual_seed(0)
    forward, attributes = CHANGES[name]
    same_steps(Layers(forward, **attributes))


def test_a_list_that_forward_fills() -> None:
    class Fills(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, losses: list[Tensor]) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
                losses.append(x.square().mean())
            return x

    torch.manual_seed(0)
    model = Fills()
    results = []
    for one in (model, optimized(copy.deepcopy(model))):
        losses: list[Tensor] = []
        (one(rows(4, 8), losses).sum() + sum(losses)).backward()
        results.append([*losses, *(p.grad for p in one.parameters())])
    assert len(results[0]) == 9
    for theirs, ours in zip(*results, strict=True):
        assert_same_bits(ours, theirs, "loss or gradient")


def test_other_memory_behind_a_tensor_is_refused() -> None:
    def assigns(m: Any, x: Tensor) -> Any:
        m.a.weight.data = m.a.weight.data * 0.9
        return m.a(x)

    with pytest.raises(CaptureError, match=r"test_front\.py:\d+ puts other memory behind a tensor.*copy_"):
        optimized(Layers(assigns))(rows(4, 8))


# Random numbers of Python and numpy


@pytest.mark.works(ROW, "values drawn by Python's `random` in forward")
def test_values_drawn_by_random_are_drawn_at_each_call() -> None:
    torch.manual_seed(0)
    same_steps(Layers(lambda m, x: m.a(x) * random.random() + random.uniform(0, 2)))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_numbers_are_drawn_once_where_there_is_nothing_to_plan(requires_grad: bool) -> None:
    model = Layers(lambda m, x: m.a(x) * random.random()).requires_grad_(requires_grad)
    twin, ours = copy.deepcopy(model), optimized(model)
    for seed in range(3):
        random.seed(seed)
        expected, state = twin(rows(4, 8)), random.getstate()
        random.seed(seed)
        assert_same_bits(ours(rows(4, 8)), expected, "output")
        assert random.getstate() == state


DRAWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a layer left out": lambda m, x: m.a(x) if random.random() > 0.5 else x * m.a.bias,
    "a choice": lambda m, x: random.choice([m.a, m.b])(x),
    "a sample of rows": lambda m, x: m.a(x)[random.sample(range(4), 2)],
    "numpy's": lambda m, x: m.a(x) * float(np.random.rand()),  # noqa: NPY002
    "a mask of numpy's": lambda m, x: torch.where(torch.from_numpy(np.random.rand(4, 8) < 0.3), m.a(x), x),  # noqa: NPY002
}


@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.works(ROW, "draws of `random` and numpy that decide what is computed are refused")
def test_other_draws_are_refused_by_name(name: str) -> None:
    before = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]  # noqa: NPY002
    with pytest.raises(CaptureError, match=r"draws random numbers from (Python's `random`|numpy\.random)"):
        optimized(Layers(DRAWS[name]))(rows(4, 8))
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]) == before  # noqa: NPY002


# No way past a plan without a word


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean()

    def training_step(self, x: Tensor) -> Tensor:
        return self.distance(self(x), x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encode(x))
        return y


def test_another_method_says_that_it_is_not_planned_once() -> None:
    model = optimized(Towers())
    with pytest.warns(PlanBypassedWarning, match=r"method 'encode'.*methods=\('encode',\)"):
        model.encode(rows(4, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(rows(4, 8))
        model.training_step(rows(4, 8)).backward()  # goes through the planned forward


def test_methods_are_planned_on_request() -> None:
    torch.manual_seed(0)
    model = Towers()
    twin = copy.deepcopy(model)
    ours = optimized(model, methods=("encode",))
    for one in (twin, ours):
        (one.encode(rows(4, 8)).sum() + one(rows(4, 8)).sum()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(mine.grad, theirs.grad, name)
    assert plans_of(ours) == 2
    with pytest.raises(fxckpt.FxckptError, match="no method 'decode'"):
        optimized(Towers(), methods=("decode",))


def test_a_replaced_forward_is_planned() -> None:
    torch.manual_seed(0)

    def fused(self: Any, x: Tensor) -> Tensor:
        loss: Tensor = self.head(self.encode(x)).square().mean()
        return loss

    model = Towers()
    fused(model, rows(4, 8)).backward()
    ours = optimized(copy.deepcopy(model))
    ours.zero_grad()
    ours.forward = MethodType(fused, ours)
    ours(rows(4, 8)).backward()
    assert plans_of(ours) == 1
    for (name, mine), theirs in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert_same_bits(mine.grad, theirs.grad, name)


def test_what_nn_module_compile_left_does_not_run_past_the_plan() -> None:
    model = Towers()
    model.compile(backend="eager")
    ours = optimized(model)
    project(ours(rows(4, 8))).backward()
    assert plans_of(ours) == 1


def test_torch_compile_around_an_optimized_module_says_so() -> None:
    compiled: Callable[[Tensor], Tensor] = torch.compile(optimized(Towers()), backend="eager")
    with pytest.warns(PlanBypassedWarning, match=r"torch\.compile"):
        project(compiled(rows(4, 8))).backward()


def test_transforms_run_the_plain_forward_and_say_so() -> None:
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    model = Towers()
    ours = optimized(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradients(f: nn.Module) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
            out: Tensor = functional_call(f, p, (row[None],)).square().mean()
            return out

        found: dict[str, Tensor] = vmap(grad(loss), (None, 0))(parameters, rows(4, 8))
        return found

    expected = gradients(model)
    with pytest.warns(PlanBypassedWarning, match=r"torch\.func"):
        found = gradients(ours)
    for name, gradient in expected.items():
        assert_same_bits(found[name], gradient, name)
    with pytest.warns(PlanBypassedWarning, match=r"torch\.jit\.trace"), warnings.catch_warnings():  # noqa: PT031
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.jit.trace(ours, rows(4, 8))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.Sequential(nn.DataParallel(m))])
@pytest.mark.works(ROW, "wrappers (DDP, FSDP1, DataParallel) inside of what is optimized are refused")
def test_wrappers_are_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"DataParallel\(fxckpt\.optimize\(model"):
        optimized(wrap(Towers()))


def decides(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    if y.sum() > 0:
        y = y * 2
    return m.b(y)


def test_a_graph_break_is_an_error_or_on_request_two_graphs() -> None:
    torch.manual_seed(0)
    model = Layers(decides)
    with pytest.raises(
        CaptureError, match=r"test_front\.py:\d+ \(if y\.sum\(\) > 0.*Data-dependent.*graph_breaks=True"
    ):
        optimized(model)(rows(4, 8))
    twin = copy.deepcopy(model)
    ours = optimized(model, graph_breaks=True)
    for step in range(3):
        expected = run_step(twin, (rows(4, 8),), {}, project, seed=step)
        assert_same_step(run_step(ours, (rows(4, 8),), {}, project, seed=step), expected)
    assert plans_of(ours) >= 2


def test_a_loop_with_graph_breaks_says_that_nothing_is_planned() -> None:
    def loops(m: Any, x: Tensor) -> Any:
        for layer in (m.a, m.b):
            x = layer(x).relu()
            if x.sum() > 0:
                x = x * 2
        return x

    with pytest.warns(PlanBypassedWarning, match="no graph of the call"):
        optimized(Layers(loops), graph_breaks=True)(rows(4, 8)).sum().backward()


def test_a_model_that_dynamo_cannot_trace_is_captured_as_before_and_says_so() -> None:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def inner(m: Any, x: Tensor) -> Any:
        return m.a(x).sin()

    model = Layers(lambda m, x: m.b(inner(m, x)))
    twin = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = optimized(model)
        expected = run_step(twin, (rows(4, 8),), {}, project)
        assert_same_step(run_step(ours, (rows(4, 8),), {}, project), expected)
    said = [w for w in seen if w.category is UnguardedCaptureWarning]
    assert len(said) == 1
    assert "The reason: " in str(said[0].message)


class _Counts(nn.Module):
    """Asks for the values of its argument, which it may change before."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(8, 8), change

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.change(mask)
        y: Tensor = self.linear(x)
        return y.sin() if (mask == 1).all() else y.cos()


def _incremented(mask: Tensor) -> None:
    mask += 1


def _of_a_view(mask: Tensor) -> None:
    mask[0].add_(1)


MASKS: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda _: None,
    "by +=": _incremented,
    "by a method": lambda mask: mask.add_(1),
    "by an index": lambda mask: mask.__setitem__(0, 3),
    "by out=": lambda mask: torch.add(mask, 1, out=mask),
    "through a view": _of_a_view,
}


@pytest.mark.filterwarnings("ignore::fxckpt.errors.ReplanningWarning")
@pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")
@pytest.mark.parametrize("name", MASKS)
def test_values_that_forward_asks_for_after_it_has_changed_them(name: str) -> None:
    torch.manual_seed(0)
    model = _Counts(MASKS[name])
    twin, ours = copy.deepcopy(model), optimized(model)
    for value in (0, 1, 0, 2):
        masks = [torch.full((4,), value) for _ in range(2)]
        expected = twin(rows(4, 8), masks[0])
        try:
            found = ours(rows(4, 8), masks[1])
        except CaptureError as error:
            assert "reads the value of a tensor" in str(error)  # noqa: PT017 - what is refused is not wrong
            continue
        assert_same_bits(found, expected, f"output where the mask is {value}")
        assert torch.equal(*masks)


def _one_of_several(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x)
    if any((y > bound).any() for bound in (1e9, 1e10)) or not all([(y == y).all(), (y < 1e9).all()]):
        raise ValueError("too large")
    return y.sin()


def _of_a_distribution(m: Any, x: Tensor) -> Tensor:
    drawn: Tensor = torch.distributions.Normal(m.a(x), F.softplus(m.b(x))).rsample()
    return drawn


def _of_its_own_gradient(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x)
    (gradient,) = torch.autograd.grad(y.sin().sum(), y, create_graph=True)
    return y + gradient.square()


TRACED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "any and all of several checks": _one_of_several,
    "distributions": _of_a_distribution,
    "a gradient of what it computed": _of_its_own_gradient,
}


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.works(ROW, *TRACED)
def test_what_dynamo_traces_with_our_answers(name: str) -> None:
    torch.manual_seed(0)
    same_steps(Layers(TRACED[name]), steps=2)


def test_a_plan_that_was_given_is_left_where_backward_starts_elsewhere() -> None:
    torch.manual_seed(0)
    model = Layers(_both)
    plan = fxckpt.plan(model, "1GB", example_inputs=(rows(4, 8),), cost_model="estimate")
    ours = fxckpt.optimize(model, plan=plan, cost_model="estimate")
    for output in (0, 1, 0):
        (found,) = torch.autograd.grad(ours(rows(4, 8))[output].sum(), model.a.weight)
        (expected,) = torch.autograd.grad(model(rows(4, 8))[output].sum(), model.a.weight)
        assert_same_bits(found, expected, "gradient")


def _both(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    features = m.a(x).sin()
    return m.b(features), features


# Batches of one


BATCHES: dict[str, Callable[[], nn.Module]] = {
    "tokens as an image": lambda: _Tokens(nn.Sequential(nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 1))),
    "relu of tokens as an image": lambda: _Tokens(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1))),
    "batch norm": lambda: _Tokens(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))),
    "pooling": lambda: _Tokens(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1))),
    "upsampling": lambda: _Tokens(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 1))),
}


class _Tokens(nn.Module):
    def __init__(self, image: nn.Module) -> None:
        super().__init__()
        self.project, self.image = nn.Linear(8, 8), image

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.image(self.project(x).transpose(1, 2).reshape(len(x), 8, 4, 4))
        return y


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.works(ROW, "batches of one")
def test_any_batch_size(name: str, batch: int) -> None:
    torch.manual_seed(0)
    model = BATCHES[name]()
    twin = copy.deepcopy(model)
    expected = twin(rows(batch, 16, 8))
    project(expected).backward()
    found = optimized(model)(rows(batch, 16, 8))
    project(found).backward()
    assert_same_bits(found, expected, "output")
    assert found.stride() == expected.stride()
    for (path, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(mine.grad, theirs.grad, path)


# Limits, memory, threads


def test_too_many_plans_are_forgotten_and_it_says_what_changes() -> None:
    torch.manual_seed(0)
    model = Towers()
    ours = optimized(model, max_plans=3)
    with pytest.warns(ReplanningWarning, match=r"captured and planned anew.*size mismatch"):  # noqa: PT031
        for batch in (*range(1, 8), 2, 1):
            assert_same_bits(ours(rows(batch, 8)), model(rows(batch, 8)), "output")
            assert plans_of(ours) <= 3


def test_all_is_freed_with_the_module() -> None:
    model = optimized(Towers())
    model(rows(4, 8)).sum().backward()
    planner = planner_of(model)
    assert planner is not None
    assert planner.latest is not None
    kept = [weakref.ref(planner.latest.program), weakref.ref(model.body.weight), weakref.ref(planner)]
    del model, planner
    gc.collect()
    assert not any(reference() for reference in kept)


@pytest.mark.filterwarnings("ignore::fxckpt.errors.ReplanningWarning")  # each thread's first plan is one in a row
def test_threads() -> None:
    torch.manual_seed(0)
    model = Towers()
    ours = optimized(model)
    expected = [torch.autograd.grad(model(rows(n + 1, 8)).sum(), [*model.parameters()]) for n in range(3)]
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for mine, theirs in zip(
                torch.autograd.grad(ours(rows(n + 1, 8)).sum(), [*model.parameters()]), expected[n], strict=True
            ):
                assert_same_bits(mine, theirs, "gradient")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n % 3,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_dynamos_settings_are_as_they_were() -> None:
    from torch._dynamo import config

    before = config.save_config()
    optimized(Towers())(rows(4, 8)).sum().backward()
    assert config.save_config() == before


# torch.compile


def test_the_backend_of_torch_compile() -> None:
    from fxckpt.integrations.torch_compile import fxckpt as backend

    torch.manual_seed(0)
    model = Towers()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, options={"memory_budget": "1GB"})
    for one in (model, compiled):
        one(rows(4, 8)).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(theirs.grad, mine.grad, name)
