"""Random numbers of Python and numpy: a graph can't draw them, and what was drawn once must not stay for ever."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from fxckpt.errors import CaptureError


@contextlib.contextmanager
def draws_refused() -> Iterator[None]:
    """Refuse what is captured within if it draws numbers, which are put back.

    Raises:
        CaptureError: Python's or numpy's random-number generator was used.
    """
    before = _states()
    try:
        yield
    finally:
        drawn = [name for name, state in _states().items() if not _same(state, before[name])]
        _put_back(before)
    if drawn:
        raise CaptureError(
            f"forward draws random numbers from {' and '.join(drawn)}, and a graph would compute with the "
            "first ones for ever. Draw outside of the model and pass what is drawn, or what follows from it, as "
            "arguments, or draw by torch (torch.rand), whose numbers graphs draw anew"
        )


def _states() -> dict[str, Any]:
    numpy: Any = sys.modules.get("numpy.random")
    states: dict[str, Any] = {"Python's `random`": random.getstate()}
    if numpy is not None:
        states["numpy.random"] = numpy.get_state(legacy=False)
    return states


def _put_back(states: dict[str, Any]) -> None:
    random.setstate(states["Python's `random`"])
    if "numpy.random" in states:
        sys.modules["numpy.random"].set_state(states["numpy.random"])


def _same(state: Any, before: Any) -> bool:
    return bool(state == before) if isinstance(state, tuple) else _flat(state) == _flat(before)


def _flat(state: dict[str, Any]) -> list[Any]:
    inner = state["state"]
    return [inner["pos"], inner["key"].tobytes(), state["has_gauss"], state["gauss"]]
