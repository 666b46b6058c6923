"""How long things take on a device, disturbed as little as can be.

On CPU a call is over when it returns. A GPU is told what to do and does it later; whoever waits for it after each call
measures how long that takes. So calls are timed by events that the GPU itself records between them, several calls in a
row, and it is waited for once at the end: meanwhile the next calls are told, as they are in a training step.

After a warm-up the fastest of several runs counts, not their median: what disturbs a run only ever adds time, so the
least is nearest to what the op itself takes (Chen and Revels, 2016, arXiv:1608.04295). On a busy machine both scatter
alike, but the median is also too high.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

_FEWEST_RUNS, _MOST_RUNS, _ENOUGH_US = 3, 20, 10_000.0
_ONCE_US = 1_000.0  # on a GPU, calls that take longer than this are timed one by one, shorter ones in a row
_LONGEST_ROW, _ROWS = 10, 3


class Clock(Protocol):
    """Times several calls, then tells all times."""

    def time(self, name: str, run: Callable[[], Any], expected_us: float) -> None:
        """Time a call that is expected to take about `expected_us` [µs]."""

    def finish(self) -> dict[str, float]:
        """How long each call took, by its name [µs]."""


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return WallClock() if device.type == "cpu" else EventClock(torch.get_device_module(device.type), device)


class WallClock:
    """Times calls that are over when they return; the first run of each is the warm-up."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """`now` is the time [s]."""
        self._now = now
        self._found: dict[str, float] = {}

    def time(self, name: str, run: Callable[[], Any], expected_us: float) -> None:
        """See `Clock`; here it does not matter what is expected."""
        del expected_us
        times: list[float] = []
        self._once(run)
        while len(times) < _FEWEST_RUNS - 1 or (len(times) < _MOST_RUNS and sum(times) < _ENOUGH_US):
            times.append(self._once(run))
        self._found[name] = min(times)

    def finish(self) -> dict[str, float]:
        """See `Clock`."""
        return self._found

    def _once(self, run: Callable[[], Any]) -> float:
        start = self._now()
        run()
        return (self._now() - start) * 1e6


class EventClock:
    """Times calls by events of the device's own, in its current stream."""

    def __init__(self, module: Any, device: torch.device) -> None:
        """`module` is that of the device's kind, such as `torch.cuda`."""
        self._module, self._device = module, device
        self._rows: dict[str, tuple[int, list[tuple[Any, Any]]]] = {}

    def time(self, name: str, run: Callable[[], Any], expected_us: float) -> None:
        """See `Clock`; nothing waits for the device."""
        stream = self._module.current_stream(self._device)
        length = min(_LONGEST_ROW, max(1, math.ceil(_ONCE_US / max(expected_us, 1.0))))
        rows = []
        run()
        for _ in range(_ROWS):
            start, end = (self._module.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            for _ in range(length):
                run()
            end.record(stream)
            rows.append((start, end))
        self._rows[name] = length, rows

    def finish(self) -> dict[str, float]:
        """See `Clock`. Waits for the device, once."""
        self._module.synchronize(self._device)
        return {
            name: min(start.elapsed_time(end) for start, end in rows) * 1e3 / length
            for name, (length, rows) in self._rows.items()
        }
