"""A schedule as two fx graphs, and what they take and hand over: what rewriting makes and backends run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx


def deliver(*gradients: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Hand finished gradients over: what a backend makes of a call of this is where backward pauses."""
    return list(gradients)


@dataclass(frozen=True)
class Stage:
    """Gradients that leave together: after step `step`, those of the inputs `inputs` (indices into the roles)."""

    step: int
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Emitted:
    """The two graphs of a plan.

    Each node's meta says what it is: `fxckpt_step` (the step of the schedule; on ops only) and `fxckpt_node` (the
    captured node whose value it is).

    Attributes:
        forward: takes all inputs of the step; returns updates, then outputs, then what is saved.
        backward: takes what is saved, then the inputs named by `given`, then the tangents of `tangents`; calls
            `deliver` where a stage ends.
        saved: the forward graph's nodes whose values are saved.
        given: indices of the inputs that backward reads.
        tangents: indices of the outputs whose tangents backward takes.
        stages: what is delivered when.
        read_outputs: indices of the outputs that backward reads, so that the caller must not change them in place.
        checks_values: whether forward may end with `UnexpectedValue`.
    """

    forward: fx.Graph
    backward: fx.Graph
    saved: tuple[fx.Node, ...]
    given: tuple[int, ...]
    tangents: tuple[int, ...]
    stages: tuple[Stage, ...]
    read_outputs: tuple[int, ...]
    checks_values: bool
