"""Where pictures look: of many steps, drawn in few columns, the ones in which most bytes are in use."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fxckpt.core.simulate import Timeline
from fxckpt.errors import FxckptError

Axis = Literal["time", "steps"]
"""What runs along a picture: simulated time, or steps, each as wide as the other."""


def ticks(timeline: Timeline, axis: Axis) -> npt.NDArray[np.float64]:
    """Where each step begins along an axis, and at the end where the last one ends; shape (steps + 1,) [µs or steps].

    Steps stand in for time where no op takes any.

    Raises:
        FxckptError: there is no such axis, or there are no steps.
    """
    if axis not in ("time", "steps"):
        raise FxckptError(f'the axis must be "time" or "steps", not {axis!r}')
    if not len(timeline.schedule):
        raise FxckptError("this plan has no ops: there is nothing to draw")
    if axis == "time" and timeline.start_us[-1] > 0:
        return timeline.start_us
    return np.arange(len(timeline.schedule) + 1, dtype=np.float64)


def columns(timeline: Timeline, axis: Axis, most: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Edges of at most `most` columns along an axis, and the step that each column shows.

    Where there are fewer steps than that, each has a column of its own. Else columns are equally wide and each shows
    the step of most bytes of those that it touches, so that no peak is lost.
    """
    begins = ticks(timeline, axis)
    steps = len(begins) - 1
    if steps <= most:
        return begins, np.arange(steps)
    edges = np.linspace(0.0, begins[-1], most + 1)
    first = np.searchsorted(begins[1:], edges[:-1], side="left")
    last = np.searchsorted(begins[:-1], edges[1:], side="right")
    shown = [a + int(timeline.live_bytes[a:b].argmax()) for a, b in zip(first, last, strict=True)]
    return edges, np.array(shown)
