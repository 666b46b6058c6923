"""For every model, solver and budget: the optimized step leaves exactly what the plain step leaves."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fxckpt
from benchmarks.models.cases import CASES, FULL, Case
from benchmarks.models.training import Step, assert_same_step, clear_gradients, plain_step, run_step
from fxckpt import api
from fxckpt.core.graph import Graph
from fxckpt.core.plans import Plan
from fxckpt.core.schedule import Schedule
from fxckpt.core.solvers import SOLVERS, Solution, solve
from fxckpt.errors import InfeasibleBudgetError
from tests.support.captured import CapturedOnce

# Plans are made here from sizes alone: what kernels allocate inside shows where they are applied.
pytestmark = pytest.mark.filterwarnings("ignore::fxckpt.errors.OverBudgetWarning")

BUDGET_RATIOS = (0.9, 0.7, 0.5, 0.3)


class Subject:
    """A case with its captured graph and the step of its plain model, both made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.args, self.kwargs = case.build()
        self.initial = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.expected: Step = plain_step(self.model, self.args, self.kwargs, case.loss)
        self.checked: set[Schedule] = set()
        self.capture = CapturedOnce()
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
        """Run a plan once and compare; a schedule that another solver found too runs only once."""
        if plan.schedule in self.checked:
            return
        with mock.patch("fxckpt.pipeline.capture", self.capture):
            model = fxckpt.optimize(
                self.reset(),
                example_inputs=self.args,
                example_kwargs=self.kwargs,
                cost_model="estimate",
                plan=plan,
            )
        assert_same_step(run_step(model, self.args, self.kwargs, self.case.loss), self.expected)
        self.checked.add(plan.schedule)


def options_of(solver: str, graph: Graph, effort: str) -> dict[str, Any]:
    """Options to test a solver with: for "collection" every second module, for those that search how long to."""
    modules = list(dict.fromkeys(op.module for op in graph.ops[: graph.forward_count] if op.module))
    known = inspect.signature(SOLVERS[solver].function).parameters
    return {name: value for name, value in {"keep": modules[::2], "effort": effort}.items() if name in known}


def at_budget_or_floor(graph: Graph, budget_bytes: int, solver: str, **options: Any) -> tuple[Solution, int]:
    """What a solver finds for a budget or, if it can't fit that, for the floor that it names; and that budget."""
    try:
        return solve(graph, budget_bytes, solver, **options), budget_bytes
    except InfeasibleBudgetError as error:
        floor_bytes = error.floor_bytes
    assert floor_bytes > budget_bytes
    return solve(graph, floor_bytes, solver, **options), floor_bytes


def plans(subject: Subject, solver: str, ratios: Iterable[float], effort: str) -> Iterator[Plan]:
    """Different plans of a solver at fractions of the plain peak and at its floor, each within its budget."""
    graph, seen = subject.graph, set()
    options = options_of(solver, graph, effort)
    budgets = [int(ratio * subject.plain_plan.baseline.peak_bytes) for ratio in ratios]
    for asked_bytes in (*budgets, 0):
        solution, budget_bytes = at_budget_or_floor(graph, asked_bytes, solver, **options)
        assert solution.timeline.peak_bytes <= budget_bytes
        if solution.schedule not in seen:
            seen.add(solution.schedule)
            yield Plan.of(solution.timeline, solver=solver, cost_model="reference", budget_bytes=budget_bytes)


@functools.lru_cache(maxsize=1)
def subject_of(case: Case) -> Subject:
    return Subject(case)


GENERAL = [name for name, method in SOLVERS.items() if not method.exact]


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_small_models(case: Case, solver: str) -> None:
    subject = subject_of(case)
    for plan in plans(subject, solver, (0.8,), "fast"):
        subject.check(plan)


@pytest.mark.slow
@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("case", [*CASES, *FULL], ids=repr)
def test_every_budget(case: Case, solver: str) -> None:
    subject = subject_of(case)
    for plan in plans(subject, solver, BUDGET_RATIOS, "default"):
        subject.check(plan)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_model_that_plans_at_its_first_call(case: Case) -> None:
    subject = subject_of(case)
    model = fxckpt.optimize(subject.reset(), 0.9)  # above the floor of the smallest models
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
    plan = next(plans(subject, "min_memory", (), "fast"))
    repeated = [subject.graph.ops[i] for i in plan.schedule.repeats()]
    assert any(op.replay for op in repeated), "the floor repeats no dropout: nothing is tested"
    subject.check(plan)
