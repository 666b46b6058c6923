"""Options, the curve, advice, the largest batch and the comparison, on models: by function and on the command line."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxckpt
from fxckpt.api import plan_of
from fxckpt.cli.main import main
from fxckpt.errors import BudgetError, CaptureError, FxckptError, InfeasibleBudgetError, SolverError
from fxckpt.steps.comparison import Ratio, compare, flops_of, gradients_of, largest_difference
from fxckpt.steps.step import TrainingStep, timed_in_turn
from tests.support.warned import LOSS_OUTSIDE

X = torch.randn(64, 32)


class Net(nn.Module):
    """A chain with dropout, so that equal gradients need equal random numbers."""

    def __init__(self, layers: int = 6, rate: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.dropout = nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(torch.nn.functional.gelu(layer(x)))
        return x


def repeats(plan: fxckpt.Plan) -> int:
    return sum(plan.schedule.repeats().values())


def test_solver_options_reach_the_solver_of_plan_and_optimize() -> None:
    how: dict[str, Any] = {"example_inputs": (X,), "cost_model": "reference", "solver": "uniform"}
    one, six = (fxckpt.plan(Net(), "1GB", solver_options={"k": k}, **how) for k in (1, 6))
    assert repeats(one) < repeats(six)
    optimized = fxckpt.optimize(Net(), "1GB", solver_options={"k": 6}, **how)
    assert plan_of(optimized).schedule == six.schedule
    again = fxckpt.optimize(copy.deepcopy(optimized), "1GB", solver_options={"k": 1}, **how)
    assert plan_of(again).schedule == one.schedule


def test_effort_reaches_solvers_that_have_it() -> None:
    seen: list[str] = []

    def own(graph: Any, budget_bytes: int, *, effort: str = "none") -> Any:  # noqa: ARG001
        seen.append(effort)
        return fxckpt.plan(Net(), "1GB", example_inputs=(X,)).schedule

    fxckpt.plan(Net(), "1GB", example_inputs=(X,), solver=own, effort="max")
    assert seen == ["max"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "uniform", "effort": "fast"}, SolverError, "uniform has no effort"),
        ({"effort": "medium"}, SolverError, "no effort 'medium'"),
        ({"solver_options": {"k": 3}}, SolverError, r"auto can't be called with options \['k'\]"),
        ({"sovler": "dp"}, TypeError, "no option 'sovler'; there are solver, effort"),
        ({"cost_model": "guess"}, BudgetError, "no cost model 'guess'"),
        ({"reserve": -1}, BudgetError, "reserve"),
    ],
)
@pytest.mark.parametrize("function", [fxckpt.optimize, fxckpt.plan, fxckpt.pareto, fxckpt.advise])
def test_wrong_options_are_refused_before_anything_is_captured(
    function: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    budget = () if function in (fxckpt.pareto, fxckpt.advise) else ("1GB",)
    with pytest.raises(error, match=message):
        function(nn.Module(), *budget, **options)  # a module without forward


@pytest.mark.filterwarnings(LOSS_OUTSIDE)
def test_the_curve_of_a_model_has_the_floor_that_the_error_names() -> None:
    how: dict[str, Any] = {"example_inputs": (X,), "cost_model": "reference", "effort": "fast"}
    found = fxckpt.pareto(Net(), **how)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fxckpt.plan(Net(), 1, **how)
    assert found.floor.predicted.peak_bytes == caught.value.floor_bytes
    assert found.baseline == fxckpt.plan(Net(), "1GB", **how).baseline
    optimized = fxckpt.optimize(Net(), plan=found.knee(), example_inputs=(X,))
    assert plan_of(optimized).schedule == found.knee().schedule


def test_advice_counts_the_optimizer() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    how: dict[str, Any] = {"example_inputs": (X,), "cost_model": "reference", "effort": "fast"}
    with_state = fxckpt.advise(model, optimizer=optimizer, **how)
    without = fxckpt.advise(model, **how)
    assert with_state.optimizer_bytes > 2 * 4 * sum(p.numel() for p in model.parameters())
    assert with_state.baseline.peak_bytes == without.baseline.peak_bytes + with_state.optimizer_bytes
    assert fxckpt.advise(model, 1.0, **how).verdict == "unnecessary"


def test_the_largest_batch_of_a_model_on_the_meta_device(capsys: pytest.CaptureFixture[str]) -> None:
    def build(batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        with torch.device("meta"):
            return Net(layers=3), {"x": torch.randn(batch, 32)}

    how: dict[str, Any] = {"effort": "fast", "cost_model": "reference"}
    found = fxckpt.max_batch(build, "200KB", progress=False, **how)
    assert capsys.readouterr().err == ""
    assert found.plan.predicted.peak_bytes <= 200_000
    assert found.plan.cost_model == "reference"
    model, inputs = build(found.batch_size + 1)
    with pytest.raises(InfeasibleBudgetError):
        fxckpt.plan(model, "200KB", example_kwargs=inputs, **how)
    affordable = fxckpt.max_batch(build, "200KB", max_overhead=0.1, progress=False, **how)
    assert affordable.batch_size < found.batch_size
    assert affordable.plan.predicted.recompute_us <= 0.1 * affordable.plan.baseline.step_us
    model, inputs = build(affordable.batch_size + 1)
    dearer = fxckpt.plan(model, "200KB", example_kwargs=inputs, **how)
    assert dearer.predicted.recompute_us > 0.1 * dearer.baseline.step_us


@pytest.mark.parametrize(("budget", "bounds"), [(0.5, {}), ("1MB", {"least": 0}), ("1MB", {"least": 5, "most": 4})])
def test_a_largest_batch_needs_a_size_and_bounds(budget: Any, bounds: dict[str, int]) -> None:
    with pytest.raises(BudgetError, match="the largest batch"):
        fxckpt.max_batch(lambda _: (Net(), (X,)), budget, **bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_overhead", [-0.1, float("nan"), "20%"])
def test_a_price_below_nothing_is_refused(max_overhead: Any) -> None:
    with pytest.raises(BudgetError, match="max_overhead is a fraction"):
        fxckpt.max_batch(lambda _: (Net(), (X,)), "1MB", max_overhead=max_overhead)


@pytest.mark.parametrize("function", [fxckpt.optimize, fxckpt.plan, fxckpt.advise])
@pytest.mark.parametrize("model", [3, "gpt2", Net])
def test_what_is_neither_module_nor_function_is_refused(function: Any, model: Any) -> None:
    with pytest.raises(FxckptError, match=r"must be a torch.nn.Module, or a function .* not (int|str|type)"):
        function(model, "1GB", example_inputs=(X,))


def test_forgotten_inputs_are_asked_for() -> None:
    with pytest.raises(CaptureError, match=r"missing 1 required .* give example_inputs"):
        fxckpt.plan(Net(), "1GB")
    with pytest.raises(CaptureError) as caught:
        fxckpt.plan(Net(), "1GB", example_kwargs={"y": X})
    assert "give example_inputs" not in str(caught.value)


@pytest.mark.parametrize("result", [Net(), (Net(),), (Net(), X)])
def test_a_function_of_the_batch_returns_model_and_inputs(result: Any) -> None:
    with pytest.raises(FxckptError, match=r"model_fn\(1\) must return \(model, inputs\)"):
        fxckpt.max_batch(lambda _: result, "1MB", progress=False)


def test_a_benchmark_shows_what_recomputing_does() -> None:
    model = Net()
    optimized = fxckpt.optimize(model, "1GB", solver="uniform", solver_options={"k": 6}, cost_model="reference")
    state = [p.detach().clone() for p in model.parameters()]
    before = torch.random.get_rng_state()
    found = fxckpt.benchmark(model, optimized, example_inputs=(X,), runs=2)
    assert found.same_bits
    assert found.largest_gradient_difference == 0
    assert found.optimized.peak_bytes < found.plain.peak_bytes
    layer_flops = 2 * 64 * 32 * 32
    assert found.plain_flops == (3 * 6 - 1) * layer_flops  # forward, two products in backward, but none for the input
    assert found.optimized_flops > found.plain_flops
    assert (found.optimized_flops - found.plain_flops) % layer_flops == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), state, strict=True))
    data = json.loads(found.to_json())
    assert data["time_ratio"].keys() == {"median", "low", "high"}
    assert data["flops_ratio"] == found.flops_ratio
    assert "the same to the last bit" in str(found)


def test_gradients_that_differ_are_seen_and_gradients_held_already_are_kept() -> None:
    model, other = Net(rate=0.0), Net(rate=0.0)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = fxckpt.benchmark(model, other, example_inputs=(X,), runs=2)
    assert not found.same_bits
    assert found.largest_gradient_difference > 0
    assert "Gradients: differ by" in str(found)
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (torch.ones(2), torch.ones(2), 0.0),
        (torch.ones(2), torch.tensor([1.0, 3.0]), 2.0),
        (torch.tensor(0.0), torch.tensor(-0.0), 0.0),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), 0.0),
        (torch.tensor([torch.nan]), torch.ones(1), float("inf")),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), 2.0),
        (torch.zeros(0), torch.zeros(0), 0.0),
        (None, None, 0.0),
        (None, torch.zeros(1), float("inf")),
    ],
)
def test_largest_difference(ours: torch.Tensor | None, theirs: torch.Tensor | None, difference: float) -> None:
    assert largest_difference([ours], [theirs]) == difference


def test_models_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(FxckptError, match="different parameters"):
        fxckpt.benchmark(Net(3), Net(4), example_inputs=(X,))
    with pytest.raises(FxckptError, match="at least two runs"):
        fxckpt.benchmark(Net(), Net(), example_inputs=(X,), runs=1)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(FxckptError, match="meta device"):
        fxckpt.benchmark(model, model, example_inputs=(X,))


def test_steps_are_timed_in_turn_and_leave_no_trace() -> None:
    order: list[int] = []

    class Noted(Net):
        def __init__(self, number: int) -> None:
            super().__init__(layers=1)
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.number)
            return super().forward(x)

    models = [Noted(number) for number in range(3)]
    times = timed_in_turn([TrainingStep(model, (X,), {}, loss=torch.sum) for model in models], runs=3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(one) for one in times] == [3, 3, 3]
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def test_a_ratio_is_of_neighbours() -> None:
    ratio = Ratio.of([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert ratio.median == 3.0
    assert ratio.low < ratio.median < ratio.high


def test_inputs_that_require_gradients_are_compared_too() -> None:
    x = X.clone().requires_grad_()
    step = TrainingStep(Net(1), (x,), {})
    assert len(gradients_of(step)) == 3
    assert x.grad is None
    assert flops_of(step) == 3 * 2 * 64 * 32 * 32


def test_attention_on_a_cpu_is_counted() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 4, 16, 8, requires_grad=True)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert flops_of(TrainingStep(Attention(), (x,), {})) == (2 + 5) * product


SOURCE = """
import torch
from torch import nn

def build():
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)]
    return nn.Sequential(*layers), (torch.randn(64, 32),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "insight_model.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "insight_model", raising=False)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings(LOSS_OUTSIDE)
def test_bench_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "insight_model:build", "--memory-budget", "90%", "--cost-model", "reference", "--runs", "2"]
    assert main([*command, "--effort", "fast"]) == 0
    assert "the same to the last bit" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_bits"] is True
    assert main([*command, "--solver", "uniform", "--solver-option", "k=6", "--effort", "fast"]) == 2
    assert "uniform has no effort" in capsys.readouterr().err


def test_solver_options_and_cost_cache_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "insight_model:build", "--memory-budget", "1GB", "--solver", "uniform"]
    assert main([*command, "--solver-option", "k=6", "--cost-model", "measure", "--cost-cache", "costs.json"]) == 0
    assert "runs more than the plain model" in capsys.readouterr().out
    assert json.loads((folder / "costs.json").read_text())["fxckpt_costs"] == 1
    assert main([*command, "--solver-option", "k"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_compare_takes_any_two_steps() -> None:
    model = Net()
    found = compare(*(TrainingStep(model, (X,), {}, loss=torch.sum) for _ in range(2)), runs=2)
    assert (found.same_bits, found.flops_ratio, found.peak_ratio) == (True, 1.0, 1.0)
