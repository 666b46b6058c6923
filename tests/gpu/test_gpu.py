"""The same promises on a CUDA device: bits, budget, replayed random draws, free memory as the default budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxckpt
from benchmarks.models.cases import CASES, Case
from benchmarks.models.cases import case as case_named
from benchmarks.models.training import assert_same_step, run_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def moved(case: Case) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    model, args, kwargs = case.build()
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), (args, kwargs))
    return model.cuda(), args, kwargs


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_gradients_are_bitwise_those_of_the_plain_model(case: Case) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, args, kwargs = moved(case)
    optimized = fxckpt.optimize(copy.deepcopy(model), 0.9, example_inputs=args, example_kwargs=kwargs)
    expected = run_step(model, args, kwargs, case.loss)
    assert_same_step(run_step(optimized, args, kwargs, case.loss), expected)


@pytest.mark.parametrize("name", ["gpt", "gpt_dropout", "resnet"])
def test_the_measured_peak_is_within_the_budget(name: str) -> None:
    model, args, kwargs = moved(case_named(name))
    optimized = fxckpt.optimize(model, 0.8, example_inputs=args, example_kwargs=kwargs)
    plan = fxckpt.graphs(optimized).plan
    assert fxckpt.measure(optimized, *args, **kwargs).peak_bytes <= plan.budget_bytes


def test_a_repeated_dropout_draws_the_same() -> None:
    model, args, kwargs = moved(case_named("gpt_dropout"))
    plain = copy.deepcopy(model)
    optimized = fxckpt.optimize(model, solver="min_memory", memory_budget=0.9)
    torch.manual_seed(1)
    expected = run_step(plain, args, kwargs, case_named("gpt_dropout").loss)
    torch.manual_seed(1)
    assert_same_step(run_step(optimized, args, kwargs, case_named("gpt_dropout").loss), expected)


def test_without_a_budget_the_free_memory_is_the_budget() -> None:
    model, args, kwargs = moved(case_named("mlp"))
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    optimized = fxckpt.optimize(model, example_inputs=args, example_kwargs=kwargs)
    assert free_bytes // 2 < fxckpt.graphs(optimized).plan.budget_bytes <= total_bytes
