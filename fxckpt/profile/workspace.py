"""Memory that kernels allocate inside and free before they return. It shows in a run only: CPU convolutions allocate
more than their outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from fxckpt.profile.standalone import Call, NoMemoryError, NotRunnableError, try_run, with_memory
from fxckpt.upstream.allocator import allocation_changes, peak_allocated_bytes

_MARK_BYTES = 14_407  # the size of an allocation that stands between two ops in the list of allocations

Failure = NotRunnableError | NoMemoryError
Peaks = dict[str, int | Failure]
"""By the name of a call: its peak [B], or why there is none."""


def peaks(calls: Mapping[str, Callable[[], Call]], device: torch.device) -> Peaks:
    """The most bytes in use while each call runs, results among them, above those in use before it [B].

    Args:
        calls: makes each call, or raises why it can't be made.
        device: where they run.
    """
    return _peaks_on_cpu(calls) if device.type == "cpu" else _peaks_elsewhere(calls, device)


def _peaks_elsewhere(calls: Mapping[str, Callable[[], Call]], device: torch.device) -> Peaks:
    """Read off the allocator's counters, call by call."""
    found: Peaks = {}
    for name, make in calls.items():
        try:
            found[name] = with_memory(functools.partial(_peak_bytes, make, device))
        except (NotRunnableError, NoMemoryError) as failure:
            found[name] = failure
    return found


def _peak_bytes(make: Callable[[], Call], device: torch.device) -> int:
    call = make()
    with call.aside():
        try_run(call)  # what is allocated once and then kept, such as handles and their buffers, is no workspace
        return peak_allocated_bytes(call.run, device)


def _peaks_on_cpu(calls: Mapping[str, Callable[[], Call]]) -> Peaks:
    """Run the calls one after another under one profiler, with a marking allocation before and after each."""
    found: Peaks = {}
    ran: list[str] = []

    def run_once(name: str, make: Callable[[], Call]) -> None:
        call = make()
        with call.aside():
            try_run(call)
            ran.append(name)
            torch.empty(_MARK_BYTES, dtype=torch.uint8)
            try:
                _ = call.run()
            finally:
                torch.empty(_MARK_BYTES, dtype=torch.uint8)

    def run_all() -> None:
        for name, make in calls.items():
            try:
                with_memory(functools.partial(run_once, name, make))
            except (NotRunnableError, NoMemoryError) as failure:
                found[name] = failure

    changes = list(allocation_changes(run_all)) if calls else []
    return dict(zip(ran, peaks_between_marks(changes), strict=True)) | found


def peaks_between_marks(changes: Iterable[int]) -> Iterator[int]:
    """Peaks of the stretches that stand between an odd mark and the next [B]."""
    inside, in_use, peak = False, 0, 0
    for change in changes:
        if change == _MARK_BYTES:
            if inside:
                yield peak
            inside, in_use, peak = not inside, 0, 0
        elif change != -_MARK_BYTES and inside:
            in_use += change
            peak = max(peak, in_use)
