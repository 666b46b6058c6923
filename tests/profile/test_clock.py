"""Clocks, with hands that tests move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxckpt.profile.clock import EventClock, WallClock
from fxckpt.profile.measure import that_matter


class Gpu:
    """Stands for `torch.cuda`: what is told to it takes time on a clock of its own; who waits is counted."""

    def __init__(self) -> None:
        self.now_us, self.waited = 0.0, 0
        gpu = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self.at: float | None = None

            def record(self, stream: str) -> None:
                assert stream == "stream of cuda:1"
                self.at = gpu.now_us

            def elapsed_time(self, end: Any) -> float:
                assert gpu.waited, "the device has not come so far yet"
                return float(end.at - self.at) / 1e3

        self.Event = Event

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"

    def synchronize(self, _: torch.device) -> None:
        self.waited += 1


def test_events_time_calls_in_a_row_and_wait_once() -> None:
    gpu, runs = Gpu(), {"short": 0, "long": 0}
    clock = EventClock(gpu, torch.device("cuda", 1))

    def run(name: str, us: list[float]) -> None:
        runs[name] += 1
        gpu.now_us += us[min(runs[name], len(us)) - 1]

    # The first run of each is slow, and so are some later ones.
    clock.time("short", lambda: run("short", [500.0, *[30.0] * 10, 20.0]), expected_us=10.0)
    clock.time("long", lambda: run("long", [9000.0, 4000.0, 3000.0, 5000.0]), expected_us=5000.0)
    assert gpu.waited == 0
    assert clock.finish() == pytest.approx({"short": 20.0, "long": 3000.0})
    assert gpu.waited == 1
    assert runs == {"short": 1 + 3 * 10, "long": 1 + 3}


def test_on_cpu_the_fastest_run_after_the_first_counts() -> None:
    now = [0.0]
    clock = WallClock(lambda: now[0])
    for name, lengths_s in (("long", [0.001, 0.9, 0.8]), ("short", [1.0, *[0.000_02] * 10, 0.000_01, *[0.000_03] * 9])):
        left = iter(lengths_s)

        def run(left: Any = left) -> None:
            now[0] += next(left)

        clock.time(name, run, expected_us=1.0)
        with pytest.raises(StopIteration):
            next(left)  # as many runs as there are lengths
    assert clock.finish() == pytest.approx({"long": 800_000.0, "short": 10.0})


def test_times_are_measured_that_make_up_all_but_a_hundredth() -> None:
    shares = {("a", ""): 900.0, ("b", ""): 5.0, ("c", ""): 90.0, ("d", ""): 4.0, ("e", ""): 1.0}
    assert that_matter(shares) == [("a", ""), ("c", "")]
    assert that_matter({("a", ""): 1.0, ("b", ""): 1.0}) == [("a", ""), ("b", "")]
    assert that_matter({}) == []
