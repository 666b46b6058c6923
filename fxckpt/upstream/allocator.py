"""Measure what a piece of code allocates, exactly: every allocation and release that torch's allocator sees.

The profiler's memory events are summed, on CPU as on CUDA, where they are blocks of the caching allocator: what
`torch.cuda.memory_allocated` counts. So the peaks that a user may be recording by `torch.cuda.max_memory_allocated` are
left alone. Resident-set sizes and dispatch modes are no substitute: the first is blurred by the C library's allocator,
the second doesn't see what kernels allocate inside.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_MIB = 2**20


@dataclass(frozen=True)
class Allocations:
    """What a run allocated.

    Attributes:
        changes_bytes: what was allocated (positive) and released (negative) on the device, in order [B].
        ops: names of the operators of torch that ran, such as "aten::mm".
    """

    changes_bytes: tuple[int, ...]
    ops: frozenset[str]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were in use, above those in use before [B]."""
        return max(accumulate(self.changes_bytes, initial=0))


_CPU = torch.device("cpu")


def allocations(run: Callable[[], Any], device: torch.device = _CPU) -> Allocations:
    """What something allocates on a device while it runs.

    Garbage is collected first, or it would be released in the midst. On CUDA the device is waited for before and after.

    Raises:
        RuntimeError: the caller is profiling already, and torch has one profiler a thread.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's library prints its probes to stderr
    _wait(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
        _wait(device)
    events = profiler.profiler.kineto_results.events()
    kind = getattr(torch._C._autograd.DeviceType, device.type.upper())
    index = torch.empty(0, device=device).get_device()  # -1: there is only one
    memory = [event for event in events if event.name() == "[memory]" and event.device_type() == kind]
    changes = [event for event in memory if index < 0 or event.device_index() == index]
    changes.sort(key=lambda event: event.start_ns())
    return Allocations(tuple(event.nbytes() for event in changes), frozenset(event.name() for event in events))


def allocation_changes(run: Callable[[], Any], device: torch.device = _CPU) -> Iterator[int]:
    """Run something; the sizes that it allocated (positive) and released (negative) on a device, in order [B]."""
    return iter(allocations(run, device).changes_bytes)


def peak_allocated_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were in use while something ran, above those in use before it [B]."""
    return allocations(run, device).peak_bytes


def caching_allocator_settings(device: torch.device) -> dict[str, Any] | None:
    """How the caching allocator of a CUDA device is set; None where another allocator serves it.

    Keys are "expandable_segments", "max_split_size" (-1: none is set) [B], "roundup_power2_divisions" (from sizes in
    MiB to divisions), as `torch.cuda.memory._snapshot` has them, and "large_segment_size" [B].
    """
    if torch.cuda.get_allocator_backend() != "native":
        return None
    with torch.cuda.device(device):
        settings: dict[str, Any] = dict(torch.cuda.memory._snapshot()["allocator_settings"])
    text = settings.get("last_allocator_settings", settings.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    large = re.search(r"large_segment_size_mb:(\d+)", text)
    settings["large_segment_size"] = _MIB * (int(large[1]) if large else 20)
    return settings


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
