"""Memory that kernels allocate inside and free before they return. It shows in a run only: CPU convolutions allocate
more than their outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from fxckpt.profile.standalone import Call, NoMemory, NotRunnable, try_run, with_memory
from fxckpt.units import CUDA_BLOCK_BYTES
from fxckpt.upstream.allocator import allocation_changes

_MARK_BYTES = {"cpu": 14_407, "cuda": 2039 * CUDA_BLOCK_BYTES}
"""By kind of device the size of an allocation that stands between two ops in the list of allocations [B]."""

Failure = NotRunnable | NoMemory
Workspaces = dict[str, int | Failure]
"""By the name of a call: its workspace [B], or why there is none."""


def workspaces(calls: Mapping[str, Callable[[], Call]], device: torch.device) -> Workspaces:
    """The most bytes in use while each call runs, above those that its results take when it ends [B].

    The calls run one after another under one profiler, with a marking allocation before and after each. What is
    allocated once and then kept, such as handles and their buffers, is no workspace: each runs once before.

    Args:
        calls: makes each call, or raises why it can't be made.
        device: where they run.
    """
    found: Workspaces = {}
    ran: list[str] = []
    mark_bytes = _MARK_BYTES["cuda" if device.type == "cuda" else "cpu"]

    def mark() -> None:
        torch.empty(mark_bytes, dtype=torch.uint8, device=device)

    def run_once(name: str, make: Callable[[], Call]) -> None:
        call = make()
        with call.aside():
            try_run(call)
            ran.append(name)
            mark()
            try:
                _ = call.run()
            finally:
                mark()

    def run_all() -> None:
        for name, make in calls.items():
            try:
                with_memory(functools.partial(run_once, name, make))
            except (NotRunnable, NoMemory) as failure:
                found[name] = failure

    changes = list(allocation_changes(run_all, device)) if calls else []
    return dict(zip(ran, peaks_between_marks(changes, mark_bytes), strict=True)) | found


def peaks_between_marks(changes: Iterable[int], mark_bytes: int) -> Iterator[int]:
    """Peaks of the stretches that stand between an odd mark and the next, above what is left at their ends [B]."""
    inside, in_use, peak = False, 0, 0
    for change in changes:
        if change == mark_bytes:
            if inside:
                yield peak - in_use
            inside, in_use, peak = not inside, 0, 0
        elif change != -mark_bytes and inside:
            in_use += change
            peak = max(peak, in_use)
