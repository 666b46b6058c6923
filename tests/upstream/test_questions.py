"""Models that ask whether they are compiled take the way that they take in eager, wherever that can be traced."""

from __future__ import annotations

import contextvars
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxckpt
from benchmarks.models.cases import project
from benchmarks.models.training import assert_same_step, plain_step, run_step
from fxckpt.upstream.questions import QUESTIONS, Questions

ACTIVE: contextvars.ContextVar[object] = contextvars.ContextVar("ACTIVE", default=None)


def compiled() -> bool:
    return torch.compiler.is_compiling()


def not_to_be_traced() -> None:
    """Dynamo can't follow this."""
    ACTIVE.set(None)


class Collector:
    """As transformers' models have one: it goes another way in Dynamo, to the same effect."""

    def __init__(self) -> None:
        self.value = 0

    def begin(self, value: int) -> None:
        if compiled():
            self.value = value
        else:
            ACTIVE.set(value)


COLLECTOR = Collector()


def asked_here(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        not_to_be_traced()
    return x.sin()


def asked_by_what_it_calls(x: Tensor) -> Tensor:
    COLLECTOR.begin(1)
    return x.sin()


def asked_twice_in_one_place(x: Tensor) -> Tensor:
    for number in range(2):
        COLLECTOR.begin(number)
    return x.sin()


def asked_in_two_places(x: Tensor) -> Tensor:
    return asked_here(asked_by_what_it_calls(x))


def asked_in_between(x: Tensor) -> Tensor:
    """A question that has nothing to do with the failure is the last before it."""
    if not compiled():
        y = x.cos() if compiled() else x.sin()
        not_to_be_traced()
        return y
    return x.sin()


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (asked_here, asked_by_what_it_calls, asked_twice_in_one_place, asked_in_two_places, asked_in_between)
}


class Asks(nn.Module):
    """Asks in places where the answer decides the bits, before and behind one where it decides whether it is traced."""

    def __init__(self, place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.place = nn.Linear(8, 8), place

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        y = y.exp() if compiled() else y.sin()
        y = self.place(y)
        return y.exp() if torch.compiler.is_dynamo_compiling() else y.tanh()


def assert_as_in_eager(model: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    expected = plain_step(model, (x,), {}, project)
    optimized = fxckpt.optimize(model, "1GB", solver="save_all", cost_model="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is captured without guards
        assert_same_step(run_step(optimized, (x,), {}, project), expected)


@pytest.mark.parametrize("name", PLACES)
def test_only_who_could_not_be_followed_hears_yes(name: str) -> None:
    assert_as_in_eager(Asks(PLACES[name]))


@pytest.mark.filterwarnings("ignore:.*is_compiling` is deprecated")
@pytest.mark.parametrize("question", sorted(QUESTIONS, key=str), ids=lambda question: str(question.__name__))
def test_each_question_hears_no(question: Callable[[], bool]) -> None:
    assert_as_in_eager(Asks(lambda x: x.exp() if question() else x.sin()))


def test_nobody_hears_that_it_is_exported() -> None:
    def place(x: Tensor) -> Tensor:
        if not compiled():
            not_to_be_traced()
        return x.exp() if torch.compiler.is_exporting() else x.sin()

    assert_as_in_eager(Asks(place))


def test_where_no_question_is_close_all_hear_yes() -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            way = deeper(4)
            if not way:
                not_to_be_traced()
            y: Tensor = self.linear(x).sin()
            return y

    def deeper(depth: int) -> bool:
        return deeper(depth - 1) if depth else torch.compiler.is_compiling()

    assert_as_in_eager(Far())


def test_who_was_told_in_vain_hears_no_again() -> None:
    questions = Questions()

    class Frame:
        def __init__(self, function: Callable[..., object], parent: Frame | None) -> None:
            self.f_code, self.parent = function.__code__, parent

    def summary(function: Callable[..., object], line: int) -> traceback.FrameSummary:
        code = function.__code__
        return traceback.FrameSummary(code.co_filename, line, code.co_name)

    outer = Frame(asked_in_between, None)
    inner = Frame(compiled, outer)
    question = torch.compiler.is_compiling
    assert questions.answer(question, inner) is False
    failed_at = [summary(asked_in_between, 1)]
    assert questions.tell(failed_at)
    questions.begin()
    assert questions.answer(question, inner) is True
    assert questions.tell(failed_at)  # of no use: all others, then
    questions.begin()
    assert questions.answer(question, Frame(asked_here, None)) is True
    assert not questions.tell(failed_at)
    questions.begin()
    assert questions.answer(question, inner) is False
