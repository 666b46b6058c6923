"""Kernels that span several steps of a plan: allowed where the plan has room for what they keep in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch._inductor.utils import get_dtype_size
from torch._inductor.virtualized import V

__all__ = ["RoomForFusion"]


@dataclass(frozen=True)
class RoomForFusion:
    """How many bytes more each step of a graph may take than planned.

    Attributes:
        free_bytes: by step, for all steps from the first to the last of the graph [B].
    """

    free_bytes: tuple[int, ...]

    def allows(self, scheduler: Any, one: Any, other: Any) -> bool:
        """Whether two nodes of Inductor's scheduler may be one kernel.

        The kernel takes all that they read and write during each of the steps that it spans. Within one step that is
        the plan; beyond, there must be room for it.
        """
        steps = [*_steps(one), *_steps(other)]
        if not steps or min(steps) == max(steps):
            return True
        written = {b.get_name() for node in (one, other) for b in node.get_outputs()}
        read = {d.name for node in (one, other) for d in node.read_writes.reads} - written
        taken = sum(_bytes(scheduler, name) for name in (*written, *read))
        return taken <= min(self.free_bytes[min(steps) : max(steps) + 1])


def _steps(node: Any) -> Iterable[int]:
    """The steps of the plan that a node of the scheduler computes."""
    for part in node.get_nodes():
        for origin in getattr(part.node, "origins", None) or ():
            if "step" in origin.meta:
                yield origin.meta["step"]


def _bytes(scheduler: Any, name: str) -> int:
    buffer = scheduler.name_to_buf.get(name)
    node = buffer.node if buffer is not None else V.graph.graph_inputs.get(name)
    if node is None:
        return 0
    try:
        size: Any = V.graph.get_allocation_storage_size(node) if buffer is not None else node.get_numel()  # type: ignore[arg-type]
        return int(size) * get_dtype_size(node.get_dtype())
    except (AttributeError, NotImplementedError, TypeError):  # what has no memory
        return 0
