"""Warnings of one thread are ignored; what other threads warn of is shown, and their filters are their own."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from fxckpt.upstream.patching import attribute_replaced


class _Ignoring(threading.local):
    """Whether this thread's warnings are ignored."""

    is_on = False


_IGNORING = _Ignoring()


class _WhileIgnoring(type):
    """Any category of warnings counts as a subclass, in threads whose warnings are ignored."""

    def __subclasscheck__(cls, _: type) -> bool:
        return _IGNORING.is_on


class _Ignored(Warning, metaclass=_WhileIgnoring):
    """The category of a filter that is left in place, since other threads may put filters back as they were before."""


@contextlib.contextmanager
def warnings_ignored() -> Iterator[None]:
    """This thread warns of nothing, whatever filters it asks for meanwhile: these are the whole process's."""
    was_on = _IGNORING.is_on
    with contextlib.ExitStack() as stack:
        for name in ("warn", "warn_explicit", "filterwarnings", "simplefilter", "resetwarnings"):
            stack.enter_context(attribute_replaced(warnings, name, _do_nothing))
        stack.enter_context(attribute_replaced(warnings, "catch_warnings", _CatchesNothing))
        if not any(known[2] is _Ignored for known in warnings.filters):
            warnings.filters.insert(0, ("ignore", None, _Ignored, None, 0))  # type: ignore[attr-defined]
        _IGNORING.is_on = True
        try:
            yield
        finally:
            _IGNORING.is_on = was_on


def _do_nothing(*_: Any, **__: Any) -> None:
    """Stands for functions of `warnings`."""


class _CatchesNothing:
    """Stands for `warnings.catch_warnings`."""

    def __init__(self, *, record: bool = False, **_: Any) -> None:
        self._caught: list[Any] | None = [] if record else None

    def __enter__(self) -> list[Any] | None:
        return self._caught

    def __exit__(self, *_: object) -> None:
        """There is nothing to put back."""
