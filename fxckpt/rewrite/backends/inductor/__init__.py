"""The backend that fuses: segments of the emitted graphs compiled by Inductor, called one after the other."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxckpt.core.simulate import Timeline
from fxckpt.profile.build import Profile
from fxckpt.rewrite.backends import Executable
from fxckpt.rewrite.backends.inductor.kernels import Kernels
from fxckpt.rewrite.backends.inductor.segments import cut
from fxckpt.rewrite.backends.python.codegen import compile_boxed
from fxckpt.rewrite.emitted import Emitted
from fxckpt.rewrite.split import emit

__all__ = ["InductorExecutable", "continuing", "executable"]


@dataclass(frozen=True)
class Run:
    """A segment that is ready to run; values are kept in numbered registers.

    Attributes:
        call: from its inputs, in a list that is emptied, to its outputs.
        inputs: the registers that it reads.
        dying: those of them that nobody reads after it.
        outputs: the registers that it writes.
        delivers: whether its outputs are handed over.
        received: the register of what is then given back, if that is to be.
        donated: places in `inputs` of what it writes over.
    """

    call: Any
    inputs: tuple[int, ...]
    dying: tuple[int, ...]
    outputs: tuple[int, ...]
    delivers: bool
    received: int | None
    donated: tuple[int, ...]


@dataclass(frozen=True)
class Half:
    """Forward or backward as segments: how many registers it has, and what runs. Inputs are in the first ones."""

    registers: int
    runs: tuple[Run, ...]

    def results(self, boxed: list[Any], *, kept: bool) -> Generator[Any, Any, None]:
        """Run it; each time values are handed over, give them in a list of the caller's, who may send others.

        Args:
            boxed: what it is given, in a list that is emptied.
            kept: whether what is given must stay as it is.
        """
        values: list[Any] = [*boxed, *[None] * (self.registers - len(boxed))]
        given = len(boxed) if kept else 0
        boxed.clear()
        for run in self.runs:
            arguments = [values[i] for i in run.inputs]
            for i in run.dying:
                values[i] = None
            for place in run.donated:
                if run.inputs[place] < given:
                    arguments[place] = arguments[place].clone()
            results = run.call(arguments)
            del arguments
            if run.delivers:
                handed_over = list(results)
                del results
                given_back = yield handed_over
                del handed_over
                if run.received is not None:
                    values[run.received] = given_back.pop()
                del given_back
            else:
                for place, i in enumerate(run.outputs):
                    values[i] = results[place]
                del results


@dataclass(frozen=True)
class InductorExecutable:
    """An `Executable` of compiled segments."""

    emitted: Emitted
    modules: tuple[fx.GraphModule, fx.GraphModule]
    halves: tuple[Half, Half]
    peak_bytes: int | None = None

    def forward(self, boxed: list[torch.Tensor], /) -> Any:
        """From all inputs of the step to updates, outputs and what is saved."""
        (results,) = self.halves[0].results(boxed, kept=False)
        return tuple(results)

    def backward(self, boxed: list[torch.Tensor], /, *, kept: bool = False) -> Any:
        """From what is saved, inputs and tangents to the gradients of each stage."""
        return self.halves[1].results(boxed, kept=kept)


def executable(profile: Profile, timeline: Timeline, hooked: frozenset[int] = frozenset()) -> InductorExecutable:
    """Emit a simulated schedule and compile it.

    Args:
        profile: the captured step.
        timeline: its simulated schedule.
        hooked: inputs that hooks may change during backward.
    """
    emitted = emit(profile, timeline.schedule, hooked)
    kernels = Kernels(profile, timeline)
    halves = (_half(profile, emitted.forward, kernels), _half(profile, emitted.backward, kernels))
    forward = compile_boxed(emitted.forward, profile.joint.module, "Forward")
    backward = compile_boxed(emitted.backward, profile.joint.module, "Backward")
    return InductorExecutable(emitted, (forward, backward), halves, kernels.peak_bytes)


def continuing(ran: Executable, emitted: Emitted, profile: Profile) -> InductorExecutable:
    """The backward of `emitted`, made from `profile`, behind the forward that `ran` runs."""
    assert isinstance(ran, InductorExecutable)
    half = _half(profile, emitted.backward, Kernels(profile, None))
    backward = compile_boxed(emitted.backward, profile.joint.module, "Backward")
    return InductorExecutable(emitted, (ran.modules[0], backward), (ran.halves[0], half))


def _half(profile: Profile, graph: fx.Graph, kernels: Kernels) -> Half:
    segments = cut(profile, graph)
    kernels.take(graph)
    registers: dict[fx.Node, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        registers[node] = len(registers)
    runs = []
    for segment, (call, donated) in zip(segments, kernels.compiled(segments), strict=True):
        inputs = tuple(registers[node] for node in segment.inputs)
        dying = tuple(registers[node] for node in segment.inputs if node in segment.dying)
        outputs: Sequence[int] = ()
        received = None
        if segment.received is not None:
            received = registers.setdefault(segment.received, len(registers))
        if not segment.delivers:
            outputs = [registers.setdefault(n, len(registers)) for n in segment.outputs if n is not None]
        runs.append(Run(call, inputs, dying, tuple(outputs), segment.delivers, received, donated))
    return Half(len(registers), tuple(runs))
