"""The same promises on a CUDA device: bits, budget, replayed random draws, free memory as the default budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import fxckpt
from benchmarks.gpu.bench import Autocast, Bench, Built
from benchmarks.models.cases import CASES, Case
from benchmarks.models.cases import case as case_named
from benchmarks.models.training import assert_same_step, run_step
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.steps.step import TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # The loss of the cases is a projection, which takes none of the memory that the warning is about.
    pytest.mark.filterwarnings("ignore:a loss that is computed outside:fxckpt.errors.OverBudgetWarning"),
]

BENCH = Bench("cuda")


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that give the same bits in every run; without warn_only, or attention's backward is not among them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def planned(built: Built, budget: float, *, autocast: bool, **options: str) -> torch.nn.Module:
    """In a fraction of the plain peak, or at the floor where that is higher: small models are mostly parameters."""
    try:
        return BENCH.optimized(built, budget, autocast=autocast, **options)
    except InfeasibleBudgetError as error:
        return BENCH.optimized(built, error.floor_bytes, autocast=autocast, **options)


def assert_trains_like_the_plain_model(case: Case, budget: float, *, autocast: bool, **options: str) -> None:
    """The step of the planned model leaves what the plain one's does, also in the device's generator."""
    model, args, kwargs = built = BENCH.build(case)
    plain = Autocast(copy.deepcopy(model), "cuda", enabled=autocast)
    optimized = Autocast(planned(built, budget, autocast=autocast, **options), "cuda", enabled=autocast)
    expected = run_step(plain, args, kwargs, case.loss)
    assert_same_step(run_step(optimized, args, kwargs, case.loss), expected)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_gradients_are_bitwise_those_of_the_plain_model(case: Case) -> None:
    assert_trains_like_the_plain_model(case, 0.6, autocast=False, cost_model="estimate")


@pytest.mark.parametrize("name", ["gpt_dropout", "unet", "bert", "llama"])
def test_so_are_those_under_autocast(name: str) -> None:
    assert_trains_like_the_plain_model(case_named(name), 0.8, autocast=True, cost_model="estimate")


@pytest.mark.parametrize("name", ["gpt_dropout", "resnet"])
def test_so_are_those_of_plans_by_measured_times(name: str) -> None:
    assert_trains_like_the_plain_model(case_named(name), 0.8, autocast=False, cost_model="measure")


@pytest.mark.parametrize("name", ["gpt", "gpt_dropout", "resnet", "bert"])
def test_the_measured_peak_is_within_the_budget(name: str) -> None:
    built = BENCH.build(case_named(name))
    optimized = planned(built, 0.8, autocast=False)
    plan = fxckpt.graphs(optimized).plan
    step = TrainingStep(optimized, *built[1:])
    step.warm_up()
    assert step.resident_bytes() + step.allocated_bytes() <= plan.budget_bytes


def test_a_repeated_dropout_draws_the_same() -> None:
    case = case_named("gpt_dropout")
    model, args, kwargs = BENCH.build(case)
    plain = copy.deepcopy(model)
    optimized = fxckpt.optimize(
        model, solver="min_memory", memory_budget=0.9, example_inputs=args, example_kwargs=kwargs
    )
    plan = fxckpt.graphs(optimized).plan
    dropouts = [i for i, op in enumerate(plan.graph.ops) if "dropout" in op.target and "backward" not in op.target]
    assert dropouts
    assert set(dropouts) & plan.schedule.repeats().keys()
    assert_same_step(run_step(optimized, args, kwargs, case.loss), run_step(plain, args, kwargs, case.loss))


def test_without_a_budget_the_free_memory_is_the_budget() -> None:
    model, args, kwargs = BENCH.build(case_named("mlp"))
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    optimized = fxckpt.optimize(model, example_inputs=args, example_kwargs=kwargs)
    assert free_bytes // 2 < fxckpt.graphs(optimized).plan.budget_bytes <= total_bytes
