"""Outputs of a step from which other outputs are computed, as logits are from features.

Hooks on such an output, `retain_grad`, and gradients with respect to it need its whole gradient in the middle of a
planned backward. Then backward hands over what it has of it, in the parts that eager autograd would add up, and goes on
with what autograd's engine makes of them. Where nobody looks, nothing is handed over.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxckpt.capture.roles import Arrival, Exchanged
from fxckpt.runtime.program import Program, Running, Tangents, inputs_behind, same_but_for_layout
from fxckpt.upstream.dispatch import asked_gradients_of, backward_keeps_graph, when_backward_ends
from fxckpt.upstream.hooks import with_hooks_noted
from fxckpt.upstream.ops.layout import layout_of


@dataclass(frozen=True)
class LeadingOutput:
    """An output from which others are computed, as its user has it.

    Attributes:
        tensor: the output, while there is anybody who has it.
        hooks: its hooks, which outlive it; those of the value that forward gave, where it is changed in place.
    """

    tensor: weakref.ref[torch.Tensor]
    hooks: dict[int, Any]

    @classmethod
    def of(cls, output: torch.Tensor) -> LeadingOutput:
        """What is to be known of an output later."""
        return cls(weakref.ref(output), with_hooks_noted(output))

    def needs_gradient(self, wanted: Sequence[Any]) -> bool:
        """Whether anybody looks at its gradient; `wanted` are tensors and edges that gradients are asked of."""
        output = self.tensor()
        if self.hooks or (output is not None and output.retains_grad):
            return True
        if output is None:
            return any(isinstance(x, GradientEdge) for x in wanted)
        edge = get_gradient_edge(output)
        return any(x is output if isinstance(x, torch.Tensor) else x == edge for x in wanted)


def is_looked_at(outputs: Iterable[LeadingOutput]) -> bool:
    """Within a backward: whether anybody looks at the gradient of one of these outputs."""
    wanted = asked_gradients_of()
    return any(output.needs_gradient(wanted) for output in outputs)


class Expected:
    """What a backward expects of the gradients that get into it, output after output.

    Whether a gradient comes, and in which layout, is known for certain only when it is there. What a program was made
    for is expected. The first time, a gradient is expected wherever one gets to from what is there.

    Attributes:
        is_planned: whether the forward that ran was planned for it.
    """

    def __init__(self, program: Program, start: Mapping[int, torch.Tensor | None], later: Iterable[int]) -> None:
        """What is expected at the start.

        Args:
            program: the one whose forward ran.
            start: the gradients that are there.
            later: the outputs whose gradients come later, in their order.
        """
        self._unknown, self._followers = list(later), program.followers
        starting = {(i, layout_of(gradient)) for i, gradient in start.items() if gradient is not None}
        self._arrivals: dict[int, Arrival] = dict(starting)
        if program.exchanges.keys() <= {*self._unknown} and program.tangents == starting | program.exchanges.items():
            self._arrivals |= program.exchanges
        self._guess()
        self.is_planned = self.tangents == program.tangents

    @property
    def tangents(self) -> Tangents:
        """What a program is made for that takes what is known and what is expected."""
        return frozenset(self._arrivals.items())

    def made(self, program: Program) -> None:
        """A program is there that was made for it: that knows the layouts which were not known."""
        self._arrivals = dict(program.tangents)

    def learn(self, output: int, gradient: torch.Tensor | None) -> bool:
        """A gradient has come, or none: whether that is as expected. If not, it is from now on."""
        found = None if gradient is None else Exchanged(layout_of(gradient))
        expected = self._arrivals.pop(output, None)
        if found is not None:
            self._arrivals[output] = found
        self._unknown.remove(output)
        self._guess()
        return found == expected

    def _guess(self) -> None:
        for output in self._unknown:
            if self._followers[output] & self._arrivals.keys():
                self._arrivals.setdefault(output, Exchanged())


class Ran(Protocol):
    """A forward that ran."""

    def program_for(self, made_for: Tangents) -> Program:
        """A program whose backward goes on from it, made for these tangents; the next forward is planned for them."""

    def launch(self, program: Program, tangents: Mapping[int, torch.Tensor | None], *, again: bool) -> Running:
        """Start a program's backward from tangents; `again`: what was saved is kept for another start."""


class Collecting:
    """A backward that starts when the gradients of all outputs are there, since nobody looks at any in between."""

    def __init__(self, start: dict[int, torch.Tensor | None], ran: Ran) -> None:
        self._tangents, self._ran = start, ran

    def come(self, output: int, gradient: torch.Tensor | None) -> None:
        """The gradient of an output is there, or there will be none."""
        self._tangents[output] = gradient

    def parts(self, _: int) -> list[torch.Tensor | None]:
        """What there is of an output's gradient, for autograd to add up: nothing is handed over."""
        return []

    def all_there(self) -> Running:
        """All gradients are there: the backward that gives those of the leaves."""
        present = frozenset((i, layout_of(g)) for i, g in self._tangents.items() if g is not None)
        return self._ran.launch(self._ran.program_for(present), self._tangents, again=backward_keeps_graph())


class Exchanging:
    """A backward that hands over, output after output, what it has of a gradient, and goes on with what comes back.

    Where something else came than was expected, it is made and run again from the start, with what is known by then. If
    it can't start again, since what was saved is freed, it goes on where that computes the same.

    Attributes:
        awaited: the output of whose gradient the parts are handed over.
    """

    def __init__(self, expected: Expected, start: dict[int, torch.Tensor | None], ran: Ran) -> None:
        self._expected, self._ran = expected, ran
        self._start, self._came = start, dict[int, torch.Tensor | None]()
        self._program: Program | None = None
        self._running: Running | None = None
        self._remembers = True
        self.awaited: int | None = None

    def come(self, output: int, gradient: torch.Tensor | None) -> None:
        """The gradient of an output is there, or there will be none."""
        self.awaited = None
        as_expected = self._expected.learn(output, gradient)
        if self._remembers:
            self._came[output] = gradient
        if not as_expected and not self._serves(output):
            self._running = None
        elif self._running is not None and gradient is not None:
            self._running.reply = [gradient]

    def _serves(self, output: int) -> bool:
        """Whether what runs computes what it should, though the gradient of an output came otherwise than expected."""
        if self._remembers or self._program is None:
            return False
        return same_but_for_layout(self._program, self._ran.program_for(self._expected.tangents), output)

    def parts(self, output: int) -> list[torch.Tensor | None]:
        """What there is of an output's gradient, for autograd to add up.

        Raises:
            RuntimeContractError: something else came than was expected, and backward can't start again.
        """
        running = self._run()
        if self._program is None or output not in self._program.exchanges:
            return []
        parts = running.advance()
        self.awaited = output
        return parts

    def all_there(self) -> Running:
        """All gradients are there: the backward that gives those of the leaves."""
        return self._run()

    def inputs_behind(self, output: int) -> frozenset[int]:
        """The inputs whose gradients come from an awaited output alone: see `program.inputs_behind`."""
        assert self._program is not None
        return inputs_behind(self._program, output)

    def _run(self) -> Running:
        if self._running is not None:
            return self._running
        again = not self._expected.is_planned or backward_keeps_graph()
        program = self._ran.program_for(self._expected.tangents)
        running = self._ran.launch(program, self._start, again=again)
        self._expected.made(program)
        self._program = program
        for gradient in self._came.values():
            if gradient is not None:
                running.advance().clear()
                running.reply = [gradient]
        if not again:
            self._remembers = False
            self._start, self._came = {}, {}
        self._running = running
        return running


def spare_hooks(hooks: dict[int, Any] | None) -> None:
    """Until backward ends, don't call a tensor's hooks without a gradient: the engine would, and eager does not."""
    if not hooks:
        return
    before = dict(hooks)
    hooks.update({key: functools.partial(_if_there, hook) for key, hook in before.items()})

    def put_back() -> None:
        hooks.update({key: hook for key, hook in before.items() if key in hooks})

    when_backward_ends(put_back)


def _if_there(hook: Callable[[torch.Tensor], Any], gradient: torch.Tensor | None) -> Any:
    return None if gradient is None else hook(gradient)
