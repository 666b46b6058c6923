"""Where backward runs: in autograd's thread of the model's device, on the streams that forward ran on, as in eager.

Autograd's engine runs a node in the thread of the device that the node's gradients are on, and makes current there the
stream on which the node's outputs were made. So what links the stages of backward lies on the model's device. Of
further devices, where a model is on several, the engine knows nothing: their streams are noted here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Where a step runs.

    Attributes:
        device: the first of the step's devices that is not the CPU; the CPU if there is none.
        streams: the present streams of its further devices.
    """

    device: torch.device
    streams: tuple[Any, ...] = ()

    @classmethod
    def of(cls, devices: Iterable[torch.device]) -> Place:
        """The place of a step on these devices, of which some may be the same."""
        first, *others = list(dict.fromkeys(d for d in devices if d.type != "cpu")) or [torch.device("cpu")]
        return cls(first, tuple([torch.get_device_module(d).current_stream(d) for d in others]))

    def link(self) -> torch.Tensor:
        """What links two nodes of autograd's here: a tensor without elements, of a type that no setting changes."""
        return torch.empty(0, dtype=torch.float32, device=self.device)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Ops run on the streams of further devices that were current when this was made."""
        with contextlib.ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(torch.get_device_module(stream.device).stream(stream))
            yield
