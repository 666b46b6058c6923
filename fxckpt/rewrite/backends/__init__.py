"""Backends: from emitted graphs to something that runs.

A backend is a module with two functions: `executable(profile, timeline, hooked)` emits a simulated schedule and makes
it run; `continuing(ran, emitted, profile)` makes another backward for a forward that runs already (see `bridge`).
Whatever a backend does to the graphs for speed, `verify` reads the graphs that it ends up with.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from torch import fx

from fxckpt.rewrite.emitted import Emitted

Backward = Generator[list[torch.Tensor | None], list[torch.Tensor] | None, None]
"""A backward that runs."""


class Executable(Protocol):
    """A planned step that runs. Inputs come in one list, which is emptied, so that each dies at its last use."""

    @property
    def emitted(self) -> Emitted:
        """The graphs that it executes, as they are executed."""

    @property
    def modules(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward, to be read: their `code` shows what runs."""

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes that a step takes by the code that runs; None where that is the schedule's peak [B]."""

    def forward(self, boxed: list[torch.Tensor], /) -> tuple[torch.Tensor, ...]:
        """From all inputs of the step to updates, outputs and what is saved."""

    def backward(self, boxed: list[torch.Tensor], /, *, kept: bool = False) -> Backward:
        """From what is saved, inputs and tangents to the gradients of each stage.

        A list that is yielded is the caller's: who empties it before going on lets its gradients die. Where an output's
        gradient is exchanged, its parts are yielded, and a list is sent with what to go on with, which is emptied; the
        tangents of such outputs are None. If what is given is `kept` for another backward, it stays as it is.
        """
