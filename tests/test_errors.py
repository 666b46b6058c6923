import pickle

import pytest

from fxckpt import errors
from fxckpt.errors import FxckptError, InfeasibleBudgetError

EXPORTED = [getattr(errors, name) for name in errors.__all__]
ALL = [e for e in EXPORTED if not issubclass(e, Warning)]


def test_every_exception_is_exported() -> None:
    defined = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, BaseException)}
    assert defined == set(errors.__all__)


def test_warnings_can_be_filtered_as_those_of_users_and_say_what_they_are() -> None:
    warnings = set(EXPORTED) - set(ALL)
    assert warnings
    assert all(issubclass(w, UserWarning) and w.__doc__ for w in warnings)


@pytest.mark.parametrize("error", ALL)
def test_every_error_can_be_caught_as_one_and_says_what_it_is(error: type[Exception]) -> None:
    assert issubclass(error, FxckptError)
    assert error.__doc__


@pytest.mark.parametrize("error", [e for e in ALL if e is not InfeasibleBudgetError])
def test_errors_travel_between_processes(error: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(error("what, where, what to do")))
    assert type(copy) is error
    assert str(copy) == "what, where, what to do"


def test_an_infeasible_budget_carries_its_floor_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(InfeasibleBudgetError("too small", budget_bytes=10, floor_bytes=20)))
    assert (str(copy), copy.budget_bytes, copy.floor_bytes) == ("too small", 10, 20)
