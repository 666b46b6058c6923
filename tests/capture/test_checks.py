"""Models may check values and raise errors: checks run whenever the step does, and raise what they raise in eager."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxckpt
from benchmarks.models.cases import project
from benchmarks.models.training import assert_same_step, run_step
from fxckpt.capture.checks import _way_without_error
from fxckpt.capture.joint import capture
from fxckpt.core.decisions import decisions
from fxckpt.errors import CaptureError, PlanBypassedWarning, UnguardedCaptureWarning, VerificationError
from fxckpt.upstream.ops.expect import EXPECT

pytestmark = pytest.mark.filterwarnings("ignore::fxckpt.errors.UnguardedCaptureWarning")  # pytest rewrites `assert`


@pytest.fixture(autouse=True, params=["traced by TorchDynamo", "called once"])
def _way(request: pytest.FixtureRequest) -> None:
    if request.param == "called once":
        request.getfixturevalue("untraceable")


def raised(y: Tensor) -> Tensor:
    if torch.isnan(y).any():
        raise ArithmeticError(f"{int(torch.isnan(y).sum())} of {[len(row) for row in y]} are NaN")
    return y * 2


def one_of_several(y: Tensor) -> Tensor:
    if y.dim() > 4 or (y.dim() == 2 and not (y == y).all()) or any([(y > 1e9).any(), (y < -1e9).any()]):
        raise ValueError("too large")
    return y.sin()


def are_fine(y: Tensor) -> bool:
    return bool((y == y).all())


def has_faults(y: Tensor) -> bool:
    return not are_fine(y)


def told_by_functions(y: Tensor) -> Tensor:
    if not are_fine(y):
        raise ValueError("not fine")
    if has_faults(y.T):
        raise ValueError("at fault")
    return y.sinh()


def asserted(y: Tensor) -> Tensor:
    assert not torch.isnan(y).any(), "NaN"
    return y.exp()


def asserted_item(y: Tensor) -> Tensor:
    assert torch.isfinite(y).all().item()
    return y.cos()


def counted(y: Tensor) -> Tensor:
    for column in (y, y.T):
        if (column != column).sum():
            raise IndexError("some are NaN")
    return y * y


def positive(y: Tensor) -> Tensor:
    return y.T @ y + torch.eye(y.shape[1]) + (y - y).sum()


def of_normal(y: Tensor) -> Tensor:
    normal = torch.distributions.Normal(y, F.softplus(y))
    drawn = normal.rsample()
    result: Tensor = drawn * normal.log_prob(drawn.detach()).sum()
    return result


CHECKS: dict[str, Callable[[Tensor], Tensor]] = {
    "raise": raised,
    "raise if one of several": one_of_several,
    "raise if a function says so": told_by_functions,
    "assert": asserted,
    "assert an item": asserted_item,
    "raise if a count is not zero": counted,
    "torch._assert_async": lambda y: (torch._assert_async((y == y).all()), y * 3)[1],
    "torch._assert_async with a message": lambda y: (torch._assert_async((y == y).all(), "NaN"), y * 3)[1],
    "distributions": of_normal,
    "distributions of many numbers": lambda y: torch.distributions.MultivariateNormal(
        y, positive(y), validate_args=False
    ).rsample(),
    "categorical distributions": lambda y: torch.distributions.Categorical(logits=y).entropy(),
    "gaussian_nll_loss": lambda y: F.gaussian_nll_loss(y, y.detach() * 2, y.detach().square().nan_to_num(-1)),
    "linalg.inv": lambda y: torch.linalg.inv(positive(y)),
    "linalg.solve": lambda y: torch.linalg.solve(positive(y), y.T),
    "linalg.cholesky": lambda y: torch.linalg.cholesky(positive(y)),
    "inverse": lambda y: positive(y).inverse(),
}
SHORT_OF_NAN = {"linalg.inv", "linalg.solve", "inverse"}
"""Checks that take NaN for a number like others."""


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y.square().mean()


class Checking(nn.Module):
    """Dropout, then something that checks values."""

    def __init__(self, check: Callable[[Tensor], Any], *, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.check = check

    def forward(self, x: Tensor) -> Any:
        y = self.check(F.dropout(self.first(x), 0.2))
        return self.last(y).tanh() if y.dim() == 2 and y.shape[1] == self.last.in_features else y


def model_of(check: Callable[[Tensor], Any], **options: Any) -> Checking:
    torch.manual_seed(0)
    return Checking(check, **options)


def rows(count: int = 16, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def failure(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """What a call raises, and where it leaves the random-number generator."""
    torch.manual_seed(3)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - that it is the same is what is tested
        model(x)
    message = re.sub(r"0x[0-9a-f]+", "", str(raised.value))
    return type(raised.value), message, torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.works(
    "layers and ops",
    "checks that raise errors for some values (`if bad: raise`, `assert`, distributions, `torch.linalg`)",
)
def test_a_step_that_passes_its_checks(name: str) -> None:
    model = model_of(CHECKS[name])
    twin, optimized = copy.deepcopy(model), fxckpt.optimize(model, "1GB", solver="min_memory", verify=True)
    for seed in range(2):
        expected = run_step(twin, (rows(),), {}, project, seed=seed)
        assert_same_step(run_step(optimized, (rows(),), {}, project, seed=seed), expected)


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in SHORT_OF_NAN])
@pytest.mark.works("errors", "checks of the model's own raise what they raise in eager, and the model works on")
def test_a_step_that_does_not(name: str) -> None:
    model = model_of(CHECKS[name])
    twin, optimized = copy.deepcopy(model), fxckpt.optimize(model, "1GB", solver="min_memory")
    assert_same_step(run_step(optimized, (rows(),), {}, project), run_step(twin, (rows(),), {}, project))
    bad = rows()
    bad[3, 5] = torch.nan
    assert failure(optimized, bad) == failure(twin, bad)
    assert_same_step(run_step(optimized, (rows(),), {}, project), run_step(twin, (rows(),), {}, project))


@pytest.mark.parametrize("name", sorted(SHORT_OF_NAN))
def test_singular_matrices(name: str) -> None:
    def of_itself(y: Tensor) -> Tensor:
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "linalg.inv": torch.linalg.inv,
            "linalg.solve": lambda z: torch.linalg.solve(z, z.T),
            "inverse": torch.inverse,
        }
        return functions[name](y * (y.abs().sum() < 1e9))

    model = model_of(of_itself)
    optimized = fxckpt.optimize(model, "1GB", solver="min_memory")
    optimized(rows()).sum().backward()
    assert failure(optimized, 1e9 * rows())[:2] == failure(model, 1e9 * rows())[:2]


def test_where_a_check_fails_and_nothing_is_raised_the_plain_forward_runs() -> None:
    def forgiving(y: Tensor) -> Tensor:
        try:
            return raised(y)
        except ArithmeticError:
            return y.nan_to_num()

    model = model_of(forgiving)
    twin, optimized = copy.deepcopy(model), fxckpt.optimize(model, "1GB", solver="min_memory")
    bad = rows()
    bad[3, 5] = torch.nan
    with pytest.warns(PlanBypassedWarning, match="without its plan"):
        found = run_step(optimized, (bad,), {}, project)
    assert_same_step(found, run_step(twin, (bad,), {}, project))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UnguardedCaptureWarning)
        assert_same_step(run_step(optimized, (rows(),), {}, project), run_step(twin, (rows(),), {}, project))
    with pytest.raises(VerificationError, match="Give inputs that pass it"):
        fxckpt.optimize(twin, "1GB", example_inputs=(bad,), verify=True)


def test_buffers_and_inputs_are_as_they_were_where_a_check_fails() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 16)

        def forward(self, x: Tensor, scratch: Tensor) -> Tensor:
            y: Tensor = self.linear(self.norm(x))
            scratch.add_(1)
            if (y != y).any():
                raise ValueError("NaN")
            return y

    model = Counts()
    twin, optimized = copy.deepcopy(model), fxckpt.optimize(model, "1GB")
    for x in (rows(), rows() * torch.nan, rows()):
        left = []
        for module in (optimized, twin):
            scratch = torch.zeros(3)
            if (x != x).any():
                with pytest.raises(ValueError, match="NaN"):
                    module(x, scratch)
            else:
                module(x, scratch).sum().backward()
            left.append([scratch, *(b.clone() for b in module.buffers())])
        for ours, theirs in zip(*left, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["raise", "distributions", "linalg.solve"])
@pytest.mark.parametrize("solver", ["auto", "min_memory", "save_all"])
def test_plans_with_checks(name: str, solver: str) -> None:
    """The plan survives being saved; the peak is as predicted; a check runs once, in forward."""
    x = rows(512, 64)
    model = WithLoss(model_of(CHECKS[name], width=64))
    budget = "1GB" if solver != "auto" else 0.95
    plan = fxckpt.plan(model, budget, example_inputs=(x,), solver=solver)
    checks = [i for i, op in enumerate(plan.graph.ops) if op.pinned == "it looks at values and may raise an error"]
    assert checks
    assert all(plan.schedule.order[: plan.schedule.forward_steps].count(i) == 1 for i in checks)
    assert all(plan.schedule.order.count(i) == 1 for i in checks)
    assert decisions(plan.timeline, plan.baseline_timeline)
    optimized = fxckpt.optimize(model, plan=fxckpt.Plan.from_json(plan.to_json()))
    expected = run_step(copy.deepcopy(model), (x,), {}, Tensor.clone)
    assert_same_step(run_step(optimized, (x,), {}, Tensor.clone), expected)
    model.zero_grad()
    measured = fxckpt.measure(optimized, x)
    assert measured.peak_bytes == pytest.approx(plan.predicted.peak_bytes, rel=0.01, abs=8192)


@pytest.mark.parametrize(
    "question",
    [
        lambda y: y.sin() if (y > 0).any() else y.cos(),
        lambda y: y.sin() if (y > 0).any() and len(y) else y.cos(),
        lambda y: [raised(y), y.cos()][int((y > 0).any())],
    ],
    ids=["one way or the other", "and", "a number"],
)
def test_other_questions_are_refused_as_before(question: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="reads the value"):
        fxckpt.optimize(model_of(question), "1GB", example_inputs=(rows(),))


def test_what_is_known_needs_no_check() -> None:
    def known(y: Tensor) -> Tensor:
        if (torch.diff(torch.arange(len(y))) != 1).any():
            raise ValueError("gaps")
        return raised(y)

    graph = capture(model_of(known), (rows(),)).module.graph
    assert [node.args[1] for node in graph.nodes if node.target is EXPECT] == [False]


class Asked:
    """Stands for a tensor: keeps the way that leads to no error at each question."""

    def __init__(self) -> None:
        self.ways: list[bool | None] = []

    def __bool__(self) -> bool:
        return self.answer(sys._getframe(1))

    def item(self) -> bool:
        return self.answer(sys._getframe(1))

    def answer(self, frame: Any) -> bool:
        self.ways.append(_way_without_error(frame))
        return bool(self.ways[-1])


def looped(x: Asked) -> None:
    while x:
        raise ValueError
    for _ in range(2):
        if not x.item():
            raise ValueError(", ".join(str(i) for i in range(3)))


def in_a_context(x: Asked) -> None:
    with torch.no_grad():
        if x:
            raise ValueError
        assert x


def combined(x: Asked) -> None:
    if (x and x) or not x:
        message = "a" if sys.argv else "b"
        raise ValueError(message)


def chained(x: Asked) -> int:
    if not sys.argv:
        return 1
    if x.item():
        return 2
    if not x:
        raise ValueError
    return 3


def kept(x: Asked) -> bool:
    answer = bool(x)
    if answer:
        raise ValueError
    other, another = bool(x), bool(x)
    if other or another:
        raise ValueError
    return answer


def generated(x: Asked) -> Iterator[int]:
    if x:
        yield 1
        raise ValueError
    if x:
        raise ValueError


def by_functions(x: Asked) -> None:
    if any([x, x]) or not all([x, x]) or sum([x.item(), x.item()]) == 3:
        raise ValueError


def by_other_means(x: Asked) -> None:
    if x:
        looped(x)
    assert bool(x) is True or x


@pytest.mark.parametrize(
    ("function", "ways"),
    [
        (looped, [False, True, True]),
        (in_a_context, [False, True]),
        (combined, [None, True]),
        (chained, [None, True]),
        (kept, [False, None, None]),
        (generated, [None, False]),
        (by_functions, [False, False, True, True, None, None]),
        (by_other_means, [None, None, True]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ways_without_an_error(function: Callable[[Asked], Any], ways: list[bool | None]) -> None:
    for _ in range(50):  # python runs code in another form once it has run it often
        asked = Asked()
        result = function(asked)
        list(result if isinstance(result, Iterator) else ())
        assert asked.ways == ways
