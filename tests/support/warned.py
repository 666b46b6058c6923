"""The warning that a loss outside of the model may take more than the budget: beside the point in most tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_SAYS = "a loss that is computed outside"

LOSS_OUTSIDE = f"ignore:{_SAYS}:fxckpt.errors.OverBudgetWarning"
"""For `pytest.mark.filterwarnings`."""


@contextmanager
def no_other_warning() -> Iterator[None]:
    """Every warning but this one is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", _SAYS)
        yield
