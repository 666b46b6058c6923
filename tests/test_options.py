"""Solver options are refused before there is a graph; budgets are read; options on the command line."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from fxckpt.cli import arguments
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.solvers import SOLVERS, check_options
from fxckpt.errors import BudgetError, FxckptError, SolverError
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
