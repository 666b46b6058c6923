"""Measure what a piece of code allocates, exactly: every allocation and release that torch's allocator sees.

On CPU the profiler's memory events are summed; on CUDA the allocator's own counters are read. Resident-set sizes and
dispatch modes are no substitute: the first is blurred by the C library's allocator, the second doesn't see what kernels
allocate inside.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def allocation_changes(run: Callable[[], Any]) -> Iterator[int]:
    """Run something on CPU; the sizes that it allocated (positive) and released (negative), in order [B]."""
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's library prints its probes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return (event.nbytes() for event in events if event.device_type() == torch._C._autograd.DeviceType.CPU)


def peak_allocated_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were in use while something ran, above those in use before it [B]."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    in_use = peak = 0
    for change in allocation_changes(run):
        in_use += change
        peak = max(peak, in_use)
    return peak
