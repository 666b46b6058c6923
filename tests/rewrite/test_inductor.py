"""The backend that fuses: gradients, peaks, masks, and what it reads off compiled code."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.cases import GPT, MLP
from fxckpt.errors import BudgetError, CaptureError, CompilationError, InfeasibleBudgetError, VerificationError
from fxckpt.integrations.torch_compile import fxckpt as backend
from fxckpt.module.stand_in import planner_of
from fxckpt.pipeline import Compiled
from fxckpt.rewrite.backends.inductor import InductorExecutable, kernels
from fxckpt.rewrite.backends.inductor.allocations import most_bytes
from fxckpt.steps.step import TrainingStep
from tests.support.warned import LOSS_OUTSIDE

pytestmark = pytest.mark.filterwarnings(LOSS_OUTSIDE)

ROUNDING = 2e-5  # of float32, in the norm
OPTIONS: dict[str, Any] = {"backend": "inductor", "cost_model": "reference"}


class Norms(nn.Module):
    """Convolutions, statistics that forward updates, dropout, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_1(self.first(x)))
        x = F.dropout(x + F.gelu(self.norm_2(self.second(x))), 0.2, self.training)
        y: Tensor = self.head(F.max_pool2d(x, 2).flatten(1))
        return y


def gpt(layers: int = 2, dropout: float = 0.0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return GPT(layers, 32, 2, 50, 16, dropout), torch.randint(0, 50, (4, 16))


def norms() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Norms(), torch.randn(8, 3, 8, 8)


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MLP(6, 32), torch.randn(256, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "gpt": gpt,
    "gpt_dropout": lambda: gpt(2, 0.2),
    "norms": norms,
    "mlp": mlp,
}

SLOW = ("gpt", "mlp")  # which are those with dropout or convolutions, and less
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]


def step(model: nn.Module, forward: Any, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Gradients and buffers after a step from a seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    forward(x).square().mean().backward()
    left = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return left | {name: buffer.clone() for name, buffer in model.named_buffers()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    whole = max(float(x.double().norm()) for x in expected.values())
    return max(
        float((found[n].double() - expected[n].double()).norm()) / max(float(expected[n].double().norm()), whole / 1000)
        for n in expected
    )


def optimize(model: nn.Module, budget: float, x: Tensor) -> nn.Module:
    """The model for a budget, or for somewhat more than the least that there is."""
    try:
        return fxckpt.optimize(model, budget, example_inputs=(x,), **OPTIONS)
    except InfeasibleBudgetError as error:
        return fxckpt.optimize(model, int(1.15 * error.floor_bytes), example_inputs=(x,), **OPTIONS)


def compiled_of(model: nn.Module) -> Compiled:
    planner = planner_of(model)
    assert planner is not None
    assert planner.latest is not None
    return planner.latest


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_gradients_are_eagers_up_to_rounding(name: str) -> None:
    model, x = MODELS[name]()
    expected = step(model, model, x)
    for budget in (1.0, 0.7):
        twin = copy.deepcopy(model)
        assert error(step(twin, optimize(twin, budget, x), x), expected) < ROUNDING


@pytest.mark.parametrize("name", EACH)
def test_a_plan_changes_nothing_but_memory_and_time(name: str) -> None:
    """Repeats draw the masks of forward: under one seed all plans give the gradients of the one without repeats."""
    model, x = MODELS[name]()
    results, repeats = [], []
    for budget in (1.0, 0.7):
        twin = copy.deepcopy(model)
        optimized = optimize(twin, budget, x)
        results.append(step(twin, optimized, x))
        repeats.append(sum(compiled_of(optimized).plan.schedule.repeats().values()))
    assert repeats[0] < repeats[1]
    assert error(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_measured_peak_is_that_read_off_the_code_and_within_the_budget(name: str, budget: float) -> None:
    model, x = MODELS[name]()
    optimized = optimize(model, budget, x)
    optimized(x).square().mean().backward()
    compiled = compiled_of(optimized)
    peak_bytes = compiled.program.executable.peak_bytes
    assert peak_bytes is not None
    assert peak_bytes <= compiled.plan.budget_bytes
    model.zero_grad()
    gc.collect()
    run = TrainingStep(model, (x,), {}, forward=optimized, loss=lambda y: y.square().mean())
    measured_bytes = run.resident_bytes() + run.allocated_bytes()
    outside_bytes = 3 * 4 * 4 * 16 * 50 if "gpt" in name else 3 * 4 * 256 * 10  # the loss is computed outside
    assert peak_bytes - outside_bytes <= measured_bytes <= 1.01 * peak_bytes + outside_bytes


def test_gradients_are_added_up_and_graphs_retained() -> None:
    model, x = gpt(1, 0.1)
    optimized = fxckpt.optimize(model, 0.8, **OPTIONS)
    loss = optimized(x).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    for p, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_a_backward_from_another_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.a(x))
            return hidden.sum(), torch.sigmoid(self.b(hidden)).sum()

    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 8)
    optimized = fxckpt.optimize(model, 1.0, **OPTIONS)
    ways: list[Callable[[Any], Any]] = [lambda y: y[0] + y[1], lambda y: y[1], lambda y: y[0]]
    for ends in ways:
        model.zero_grad()
        ends(model(x)).backward()
        expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        ends(optimized(x)).backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            if grad is None:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, grad)


def test_hooks_of_an_output_that_others_are_computed_from() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = torch.tanh(self.a(x))
            return features, self.b(torch.sigmoid(features) * features)

    torch.manual_seed(0)
    model, x = Features(), torch.randn(4, 8)
    optimized = fxckpt.optimize(model, 1.0, **OPTIONS)
    found = []
    for forward in (model, optimized, optimized):
        model.zero_grad()
        features, logits = forward(x)
        features.retain_grad()
        features.register_hook(lambda g: 2 * g)
        (logits.sum() + features.square().sum()).backward()
        found.append([features.grad, *(p.grad for p in model.parameters())])
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0])


def test_mixed_precision() -> None:
    model, x = gpt(1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, model, x)
        optimized = fxckpt.optimize(model, 0.9, **OPTIONS)
        assert error(step(model, optimized, x), expected) < 0.02


def test_verification_passes_and_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt_dropout", "mlp"):
        model, x = MODELS[name]()
        fxckpt.optimize(model, 0.9, verify=True, **OPTIONS)(x)

    def wrong(self: Any, boxed: list[Tensor], *, kept: bool = False) -> Any:
        for gradients in self.halves[1].results(boxed, kept=kept):
            yield [None if g is None else g + 0.1 for g in gradients]

    model, x = mlp()
    monkeypatch.setattr(InductorExecutable, "backward", wrong)
    with pytest.raises(VerificationError, match="run by eager torch, by more than rounding: gradient of"):
        fxckpt.optimize(model, 0.9, verify=True, **OPTIONS)(x)


def test_equal_layers_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve layers take at most half as many compiled segments more than two do."""
    counts = []
    for layers in (2, 12):
        monkeypatch.setattr(kernels, "_COMPILED", {})
        model, x = gpt(layers)
        fxckpt.optimize(model, 1.0, **OPTIONS)(x)
        counts.append(len(kernels._COMPILED))
    assert counts[1] <= 1.5 * counts[0]


def test_the_option_of_torch_compile() -> None:
    model, x = mlp()
    expected = step(model, model, x)
    options: dict[str, Any] = {"memory_budget": 0.8, **OPTIONS}
    compiled = torch.compile(model, backend=backend, options=options)
    assert error(step(model, compiled, x), expected) < ROUNDING


def test_auto_is_python_where_bits_are_asked_for_or_there_is_no_gpu() -> None:
    model, x = mlp()
    expected = step(model, model, x)
    for bitwise in (False, True):
        optimized = fxckpt.optimize(model, 0.8, backend="auto", bitwise=bitwise, cost_model="reference")
        assert error(step(model, optimized, x), expected) == 0.0


def test_options_that_contradict_each_other_are_refused() -> None:
    model, _ = mlp()
    with pytest.raises(BudgetError, match='not those of eager that bitwise=True asks for: use backend="python"'):
        fxckpt.optimize(model, 1.0, backend="inductor", bitwise=True)
    with pytest.raises(BudgetError, match="'cuda'"):
        fxckpt.optimize(model, 1.0, backend="cuda")  # type: ignore[arg-type]


def test_a_compiler_that_fails_is_an_error_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nis there")

    monkeypatch.setattr(kernels, "_COMPILED", {})
    monkeypatch.setattr(kernels, "compile_graph", fails)
    model, x = mlp()
    with pytest.raises(CompilationError, match=r'from addmm to \w+: no C\+\+ compiler. Use backend="python"'):
        fxckpt.optimize(model, 1.0, example_inputs=(x,), **OPTIONS)
    step(model, model, x)  # it is as it was


def test_kernels_for_a_gpu_that_is_not_there_are_refused() -> None:
    model, x = mlp()
    names: tuple[Any, ...] = ("inductor", "auto")
    for name in names:
        with pytest.raises(CaptureError, match='plan where the GPU is, or with backend="python"'):
            fxckpt.plan(model, 1.0, example_inputs=(x,), device="H100", backend=name)


def test_a_plan_of_kernels_is_made_without_compiling() -> None:
    model, x = gpt(2)
    plan = fxckpt.plan(model, 0.8, example_inputs=(x,), backend="inductor")
    by_ops = fxckpt.plan(model, 0.8, example_inputs=(x,))
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.baseline.peak_bytes <= by_ops.baseline.peak_bytes


CODE = """
class Runner:
    def call(self, args):
        given_0, given_1 = args
        args.clear()
        buf0 = empty_strided_cpu((4, 8), (8, 1), torch.float32)
        extern_kernels.mm(given_0, given_1, out=buf0)
        del given_0
        buf1 = buf0; del buf0  # reuse
        cpp_fused(buf1)
        with device(0):
            buf2 = torch.ops.aten.exp.default(buf1)
            assert_size_stride(buf2, (4, 8), (8, 1), 'torch.ops.aten.exp.default')
        buf3 = reinterpret_tensor(buf2, (8, 4), (4, 1), 0)
        del buf1, buf2
        buf4 = empty_strided_cpu((2, ), (1, ), torch.int64)
        return (buf3, buf4, )
"""


def test_what_code_takes_is_read_line_by_line() -> None:
    graph = fx.Graph()
    given = graph.placeholder("given")
    given.meta["val"] = torch.empty(4, 8, dtype=torch.float64)
    node = graph.call_function(torch.ops.aten.exp.default, (given,))
    node.meta["val"] = torch.empty(4, 8, dtype=torch.float64)
    graph.output((node,))
    module = fx.GraphModule({}, graph)
    assert most_bytes(CODE, (100, 0), module) == 128 - 100 + 256
    assert most_bytes(CODE, (0, 0), module) == 128 + 256
