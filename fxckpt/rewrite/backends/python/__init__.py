"""The backend that is always right: generated Python that calls op after op, bit for bit what eager torch computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxckpt.core.simulate import Timeline
from fxckpt.profile.build import Profile
from fxckpt.rewrite.backends import Executable
from fxckpt.rewrite.backends.python.codegen import compile_boxed
from fxckpt.rewrite.backends.python.in_place import overwritten, write_over_inputs
from fxckpt.rewrite.backends.python.together import call_together
from fxckpt.rewrite.emitted import Emitted
from fxckpt.rewrite.split import emit

__all__ = ["PythonExecutable", "continuing", "executable", "written_over"]


@dataclass(frozen=True)
class PythonExecutable:
    """An `Executable` of two GraphModules with generated code."""

    emitted: Emitted
    modules: tuple[fx.GraphModule, fx.GraphModule]
    peak_bytes: None = None

    def forward(self, boxed: list[torch.Tensor], /) -> Any:
        """From all inputs of the step to updates, outputs and what is saved."""
        return self.modules[0].forward(boxed)

    def backward(self, boxed: list[torch.Tensor], /, *, kept: bool = False) -> Any:  # noqa: ARG002 (nothing is changed)
        """From what is saved, inputs and tangents to the gradients of each stage."""
        return self.modules[1].forward(boxed)


def executable(profile: Profile, timeline: Timeline, hooked: frozenset[int] = frozenset()) -> PythonExecutable:
    """Emit a simulated schedule, let elementwise ops write over what nobody reads any more, and generate code.

    Args:
        profile: the captured step.
        timeline: its simulated schedule.
        hooked: inputs that hooks may change during backward.
    """
    emitted = emit(profile, timeline.schedule, hooked)
    write_over_inputs(profile, timeline, emitted)
    call_together(profile, timeline, emitted)
    forward = compile_boxed(emitted.forward, profile.joint.module, "Forward")
    backward = compile_boxed(emitted.backward, profile.joint.module, "Backward")
    return PythonExecutable(emitted, (forward, backward))


def written_over(profile: Profile, timeline: Timeline) -> dict[int, int]:
    """For each step of a schedule that will write its result over an input: the storage of that input."""
    return {step: profile.map.behind[source] for step, source in overwritten(profile, timeline).items()}


def continuing(ran: Executable, emitted: Emitted, profile: Profile) -> PythonExecutable:
    """The backward of `emitted`, made from `profile`, behind the forward that `ran` runs."""
    backward = compile_boxed(emitted.backward, profile.joint.module, "Backward")
    return PythonExecutable(emitted, (ran.modules[0], backward))
