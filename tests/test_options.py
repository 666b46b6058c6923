"""Options are written once and refused before there is a graph; budgets are read; options on the command line."""

from __future__ import annotations

import argparse
import doctest
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import fxckpt
from fxckpt.cli import arguments
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.solvers import SOLVERS, check_options
from fxckpt.errors import BudgetError, FxckptError, SolverError
from fxckpt.options import OptimizeOptions, Options, PlanOptions, flags, read_options
from fxckpt.units import within


def own(graph: Graph, budget_bytes: int, *, k: int) -> Schedule:  # noqa: ARG001
    return plain(graph)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("uniform", {"effort": "fast"}, "uniform has no effort to choose.*: auto, dp, min_memory"),
        ("dp", {"effort": "medium"}, "no effort 'medium'; choose one of fast, default, max"),
        ("dp", {"effort": None}, "no effort None"),
        ("uniform", {"n": 3}, r"uniform can't be called with options \['n'\]"),
        ("collection", {}, "missing a required argument: 'keep'"),
        ("knapsack", {}, "no solver 'knapsack'"),
        (own, {}, "own can't be called with options"),
    ],
)
def test_wrong_options_are_refused(solver: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SolverError, match=message):
        check_options(solver, options)


@pytest.mark.parametrize("effort", ["fast", "default", "max"])
@pytest.mark.parametrize("solver", ["auto", "dp", "min_memory"])
def test_searching_solvers_take_every_effort(solver: str, effort: str) -> None:
    check_options(solver, {"effort": effort})


def test_right_options_are_taken() -> None:
    for solver in SOLVERS:
        check_options(solver, {"keep": ["blocks"]} if solver == "collection" else {})
    check_options("uniform", {"k": 3})
    check_options("auto", {"effort": None})
    function: Any = own
    check_options(function, {"k": 3})


@pytest.mark.parametrize(("budget", "size_bytes"), [("2KB", 2000), (700, 700), (0.5, 512), (1.0, 1024)])
def test_budgets(budget: str | int | float, size_bytes: int) -> None:
    assert within(budget, 1024) == size_bytes


@pytest.mark.parametrize("budget", ["", "0B", 0, -1, 0.0, 1.1, float("nan"), True, None])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(BudgetError):
        within(budget, 1024)


def test_options_as_text() -> None:
    done = doctest.testmod(arguments)
    assert (done.attempted > 0, done.failed) == (True, 0)
    for text in ("k", "=3", "k=", ""):
        with pytest.raises(FxckptError, match="NAME=VALUE"):
            arguments.read_option(text)


def test_keyword_arguments_and_flags_are_the_fields_of_options() -> None:
    written = {f.name: f.type for f in fields(Options) if f.name in (*flags(), "bitwise")}
    assert {name: str(kind.__forward_arg__) for name, kind in PlanOptions.__annotations__.items()} == written
    assert PlanOptions.__annotations__.keys() - OptimizeOptions.__annotations__.keys() == {"gradients"}
    text = inspect.getdoc(Options) or ""
    assert all(f"\n    {name}: " in text for name in written)
    parser = argparse.ArgumentParser()
    arguments.add_options(parser)
    assert {action.dest for action in parser._actions} - {"help"} == set(flags())


GIVEN = {
    "solver": ("uniform", ["--solver", "uniform"]),
    "effort": ("fast", ["--effort", "fast"]),
    "solver_options": ({"k": 3, "where": "any"}, ["--solver-option", "k=3", "--solver-option", "where=any"]),
    "cost_model": ("reference", ["--cost-model", "reference"]),
    "cost_cache": ("costs.json", ["--cost-cache", "costs.json"]),
    "device": ("H100", ["--device", "H100"]),
    "optimizer": ("AdamW", ["--optimizer", "AdamW"]),
    "reserve": ("1GB", ["--reserve", "1GB"]),
    "gradients": ("allocated", ["--gradients", "allocated"]),
    "backend": ("inductor", ["--backend", "inductor"]),
}


@pytest.mark.parametrize("name", flags())
def test_each_option_is_read_from_the_command_line(name: str) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_options(parser)
    value, words = GIVEN[name]
    assert arguments.given_options(parser.parse_args(words)) == {name: value}
    assert arguments.given_options(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sovler": "dp"}, TypeError, "no option 'sovler'; there are solver, effort"),
        ({"cost_model": "guess"}, BudgetError, "no cost model 'guess'; choose one of auto, estimate, measure, ref"),
        ({"gradients": "stale"}, BudgetError, "gradients must be"),
        ({"reserve": -1}, BudgetError, "reserve must be a number of bytes"),
        ({"reserve": True}, BudgetError, "reserve must be a number of bytes"),
        ({"reserve": "some"}, BudgetError, "can't read 'some' as a size"),
        ({"optimizer": "Adm"}, BudgetError, "torch.optim has no optimizer 'Adm'"),
        ({"optimizer": "lr_scheduler"}, BudgetError, "torch.optim has no optimizer 'lr_scheduler'"),
        ({"solver": "knapsack"}, SolverError, "no solver 'knapsack'"),
        ({"effort": "long"}, SolverError, "no effort 'long'"),
    ],
)
def test_wrong_options_are_refused_at_once(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_options("1GB", given, only_plans=True)
    if "gradients" not in given:
        with pytest.raises(error, match=message):
            fxckpt.optimize(nn.Linear(2, 2), "1GB", **given)


def test_gradients_are_for_plans_only() -> None:
    given: dict[str, Any] = {"gradients": "fresh"}
    with pytest.raises(TypeError, match="no option 'gradients'"):
        fxckpt.optimize(nn.Linear(2, 2), "1GB", **given)


def test_plans_run_ops_only_on_demand() -> None:
    assert read_options("1GB", {}).run_ops
    planned = read_options("1GB", {}, only_plans=True)
    assert (planned.cost_model, planned.run_ops) == ("estimate", False)
    assert read_options("1GB", {"cost_model": "measure"}, only_plans=True).run_ops


def test_an_optimizer_is_counted_and_not_kept() -> None:
    model, x = nn.Linear(64, 64), torch.randn(8, 64)
    state_bytes = 2 * sum(4 * p.numel() for p in model.parameters()) + 2 * 4  # two moments, and a step a parameter
    optimizer = torch.optim.AdamW(model.parameters())
    options = read_options("1GB", {"optimizer": optimizer, "reserve": 100})
    assert (options.optimizer, options.reserve_bytes) == (None, 100 + state_bytes)
    peaks = [
        fxckpt.plan(model, "1GB", example_inputs=(x,), optimizer=given).predicted.peak_bytes
        for given in (None, optimizer, "AdamW", "SGD")
    ]
    assert [peak - peaks[0] for peak in peaks] == [0, state_bytes, state_bytes, 0]
    assert fxckpt.advise(model, example_inputs=(x,), optimizer="AdamW").optimizer_bytes == state_bytes
