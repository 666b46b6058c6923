"""For every model, solver and budget: the optimized step leaves exactly what the plain step leaves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxckpt
from fxckpt import api
from fxckpt.errors import InfeasibleBudgetError
from fxckpt.graph import Graph
from fxckpt.plans import Plan
from fxckpt.solvers import ORACLES, SOLVERS, Solution, solve
from tests.models import CASES, FULL, Case
from tests.training import Step, assert_same_step, clear_gradients, plain_step, run_step

BUDGET_RATIOS = (0.9, 0.7, 0.5, 0.3)


class Subject:
    """A case with its captured graph and the step of its plain model, both made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.args, self.kwargs = case.build()
        self.initial = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.expected: Step = plain_step(self.model, self.args, self.kwargs, case.loss)
        self.plain_plan: Plan = api.plan(
            self.model, 1.0, example_inputs=self.args, example_kwargs=self.kwargs, solver="save_all"
        )

    @property
    def graph(self) -> Graph:
        return self.plain_plan.graph

    def reset(self) -> nn.Module:
        """The model as it was built."""
        clear_gradients(self.model)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.initial[name])
        return self.model

    def check(self, plan: Plan) -> None:
        """Run a plan once and compare."""
        model = fxckpt.optimize(
            self.reset(), plan.budget_bytes, example_inputs=self.args, example_kwargs=self.kwargs, plan=plan
        )
        assert_same_step(run_step(model, self.args, self.kwargs, self.case.loss), self.expected)


def solver_named(name: str, graph: Graph) -> Any:
    """A solver by name; for "collection", which needs names of modules, one that keeps every second block."""
    if name != "collection":
        return name
    modules = list(dict.fromkeys(op.module for op in graph.ops[: graph.forward_count] if op.module))
    collection = functools.partial(SOLVERS[name], keep=modules[::2])
    collection.__name__ = name  # type: ignore[attr-defined]
    return collection


def at_budget_or_floor(graph: Graph, budget_bytes: int, solver: Any) -> tuple[Solution, int]:
    """What a solver finds for a budget or, if it can't fit that, for the floor that it names; and that budget."""
    try:
        return solve(graph, budget_bytes, solver), budget_bytes
    except InfeasibleBudgetError as error:
        floor_bytes = error.floor_bytes
    assert floor_bytes > budget_bytes
    return solve(graph, floor_bytes, solver), floor_bytes


def plans(subject: Subject, solver: str) -> Iterator[Plan]:
    """Different plans of a solver at all budgets and at its floor, each within its budget."""
    graph, seen = subject.graph, set()
    budgets = [int(ratio * subject.plain_plan.baseline.peak_bytes) for ratio in BUDGET_RATIOS]
    for asked_bytes in (*budgets, 0):
        solution, budget_bytes = at_budget_or_floor(graph, asked_bytes, solver_named(solver, graph))
        assert solution.timeline.peak_bytes <= budget_bytes
        if solution.schedule not in seen:
            seen.add(solution.schedule)
            yield Plan(graph, solution.schedule, solver, "reference", budget_bytes)


@functools.lru_cache(maxsize=1)
def subject_of(case: Case) -> Subject:
    return Subject(case)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ORACLES])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_small_models(case: Case, solver: str) -> None:
    subject = subject_of(case)
    for plan in plans(subject, solver):
        subject.check(plan)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ORACLES])
@pytest.mark.parametrize("case", FULL, ids=repr)
def test_full_models(case: Case, solver: str) -> None:
    subject = subject_of(case)
    for plan in plans(subject, solver):
        subject.check(plan)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_model_that_plans_at_its_first_call(case: Case) -> None:
    subject = subject_of(case)
    model = fxckpt.optimize(subject.reset(), 0.7)
    assert_same_step(run_step(model, subject.args, subject.kwargs, case.loss), subject.expected)


def test_the_floor_of_an_infeasible_budget_works() -> None:
    model, args, kwargs = CASES[1].build()
    with pytest.raises(InfeasibleBudgetError) as caught:
        api.plan(model, "1KB", example_inputs=args, example_kwargs=kwargs)
    assert caught.value.budget_bytes == 1000
    plan = api.plan(model, caught.value.floor_bytes, example_inputs=args, example_kwargs=kwargs)
    assert plan.predicted.peak_bytes <= caught.value.floor_bytes


def test_a_random_draw_that_is_repeated_draws_the_same() -> None:
    subject = subject_of(next(c for c in CASES if c.name == "gpt_dropout"))
    plan = list(plans(subject, "min_memory"))[-1]
    repeated = [subject.graph.ops[i] for i in plan.schedule.repeats()]
    assert any(op.replay for op in repeated), "the floor repeats no dropout: nothing is tested"
    subject.check(plan)
