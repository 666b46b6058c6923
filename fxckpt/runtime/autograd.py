"""Run emitted graphs under autograd.

Forward is one `autograd.Function` without gradients of its own. Backward is a chain of small ones, a stage each, linked
by an empty token tensor on the model's device (see `place`): the engine runs the first, which takes the tangents, then
stage after stage. A stage returns the gradients that it finished, and the engine accumulates them, runs their hooks and
frees them before the next stage starts.

An output that others are computed from is an ancestor of theirs, as in eager: it has a function of its own, and those
behind it one more between them, by which parts of its gradient get to it (see `exchange`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from fxckpt.capture.roles import Result
from fxckpt.errors import RuntimeContractError
from fxckpt.runtime.exchange import Collecting, Exchanging, Expected, LeadingOutput, is_looked_at, spare_hooks
from fxckpt.runtime.place import Place
from fxckpt.runtime.program import Program, Running, Tangents
from fxckpt.upstream.aot import replayed_view
from fxckpt.upstream.dispatch import backward_keeps_graph, bare_apply, plain_execution, when_backward_ends, will_run
from fxckpt.upstream.hooks import gradient_hooks_of
from fxckpt.upstream.ops.expect import UnexpectedValue
from fxckpt.upstream.ops.rng import KeptState
from fxckpt.upstream.tensors import copy_all, storage_key, version_of, versions_of

__all__ = ["BackwardFor", "Program", "Tangents", "run_forward"]

BackwardFor = Callable[[Tangents], Program]
"""Given the outputs that were differentiated, a program whose backward continues from the forward that ran."""


def run_forward(
    program: Program,
    given: Sequence[torch.Tensor],
    backward_for: BackwardFor,
    released: Callable[[], object] | None = None,
) -> list[torch.Tensor]:
    """Run a step's forward and connect it to autograd. Returns what the model returns, flat.

    Args:
        program: what to run.
        given: the tensors of `program.roles.inputs`.
        backward_for: called in backward if other outputs were differentiated than the program expects.
        released: called when what forward saved is no longer kept for a backward: one has begun, or none can come.

    Raises:
        UnexpectedValue: a check of values found something wrong. All is as before the call.
    """
    step = _Step(program, given, backward_for, released)
    token = step.place.link().requires_grad_()
    for index in reversed(range(len(program.emitted.stages))):
        leaves = [given[i] for i in program.emitted.stages[index].inputs]
        token = _apply_stage(step, index, token, *leaves)
    outputs = _under_heads(step, token)
    step.watch(outputs)
    return [_result(result, outputs, given) for result in program.roles.results]


def _under_heads(step: _Step, token: torch.Tensor) -> list[torch.Tensor]:
    """The outputs, each behind those that it is computed from."""
    program = step.program
    found: dict[int, torch.Tensor] = {}
    for position, (index, lead) in enumerate(program.leads.items()):
        found[index], token = _apply_head(step, position, token)
        token = _apply_parts(step, position, token, *[found[index]] * lead.ways)
    found.update(zip(program.heads[-1], _apply_head(step, len(program.leads), token), strict=True))
    return [found[index] for index in range(len(found))]


def _result(result: Result, outputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
    if result.kind == "output":
        return outputs[result.index]
    base, alias = given[result.index], result.alias
    if alias is None:
        return base
    return replayed_view(base, alias, result.example)


@contextlib.contextmanager
def _draws_undone(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Where a check of values ends the context, random-number generators are put back as they were."""
    devices = {"cpu", *(str(x.device) for x in tensors)}
    states = [KeptState(device) for device in devices]
    try:
        yield
    except UnexpectedValue:
        for state in states:
            state.put_back()
        raise


class _Step:
    """One forward and its backwards: what is saved between them, and backward's progress."""

    _released: Callable[[], object] | None = None

    def __init__(
        self,
        program: Program,
        given: Sequence[torch.Tensor],
        backward_for: BackwardFor,
        released: Callable[[], object] | None,
    ) -> None:
        self.program, self._given, self._backward_for = program, list(given), backward_for
        self.place = Place.of(program.devices)
        self._released = released
        self._saved: list[torch.Tensor] | None = None
        self._given_versions: list[int] = []
        self._watched: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._outputs: dict[int, torch.Tensor] = {}
        self._leading: dict[int, LeadingOutput] = {}
        self._backward: Collecting | Exchanging | None = None  # until all gradients are there
        self._running: Running | None = None
        self._to_leaves = True  # whether backward gets so far
        self._behind: frozenset[int] | None = None  # the only inputs that get gradients; None: all

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        """What was saved is kept no longer; whoever wants to know is told once."""
        released, self._released = self._released, None
        if released is not None:
            released()

    def outputs(self, position: int) -> list[torch.Tensor]:
        """The outputs of a head. The first that is asked runs forward."""
        if position == 0:
            self._outputs = dict(enumerate(self._forward()))
        return [self._outputs.pop(i) for i in self.program.heads[position]]

    def _forward(self) -> tuple[torch.Tensor, ...]:
        """Compute outputs, copy updates into the inputs that forward changes, and keep what backward reads."""
        emitted, roles = self.program.emitted, self.program.roles
        updated = self.program.updated
        undone = _draws_undone(self._given) if emitted.checks_values else contextlib.nullcontext()
        with plain_execution(), undone:
            values: tuple[torch.Tensor, ...] = self.program.executable.forward(list(self._given))
        if updated:
            with torch.no_grad():
                copy_all([self._given[i] for i in updated], values[: len(updated)])
        self._given_versions = versions_of([self._given[i] for i in emitted.given])
        first, last = len(updated), len(updated) + len(roles.outputs)
        self._saved = list(values[last:])
        return _sharing_memory(values[first:last], [role.requires_grad for role in roles.outputs])

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        """Remember the versions of the outputs that backward reads, and those that others are computed from."""
        self._leading = {i: LeadingOutput.of(outputs[i]) for i in self.program.leads}
        read = (outputs[i] for i in self.program.emitted.read_outputs)
        self._watched = [(weakref.ref(output), version_of(output)) for output in read]

    def arrived(self, position: int, gradients: list[torch.Tensor | None], *, follows: bool, to_leaves: bool) -> None:
        """The gradients of a head's outputs are there, None where there is none.

        `follows` says whether those of the heads that come before it in backward were, `to_leaves` whether backward
        goes on to the stages.
        """
        self._to_leaves = to_leaves
        came = dict(zip(self.program.heads[position], gradients, strict=True))
        gradients.clear()
        if self._backward is not None and (follows or self._goes_on(position)):
            for output in came:
                self._backward.come(output, came[output])
        else:
            self._backward = self._begun(position, came)

    def _goes_on(self, position: int) -> bool:
        """Whether a backward goes on that ended where the gradient of this head's output was asked for."""
        if self._saved is not None or not isinstance(self._backward, Exchanging):
            return False
        if (self._backward.awaited,) != self.program.heads[position]:
            return False
        self._check_unchanged()
        self._looked_at(position)
        if self._behind is None:
            self._behind = self._backward.inputs_behind(*self.program.heads[position])
        return True

    def _begun(self, position: int, tangents: dict[int, torch.Tensor | None]) -> Collecting | Exchanging:
        """A backward that starts from the outputs of a head."""
        self._running = self._behind = None
        self._check_unchanged()
        if self._saved is None:
            raise RuntimeContractError(
                "backward through the same forward a second time, but what it saved is freed. "
                "Pass retain_graph=True to the first backward"
            )
        if not self._looked_at(position):
            return Collecting(tangents, self)
        when_backward_ends(self._ended)
        later = (i for (i,) in reversed(self.program.heads[:position]))
        return Exchanging(Expected(self.program, tangents, later), tangents, self)

    def _looked_at(self, position: int) -> bool:
        """Whether anybody looks at the gradient of an output which backward gets to later than to a head."""
        later = [self._leading[i] for (i,) in self.program.heads[:position]]
        if not later or (not is_looked_at(later) and self._to_leaves):
            return False
        for output in later:
            spare_hooks(output.hooks)
        return True

    def _ended(self) -> None:
        """A backward has ended, perhaps before it came to the leaves: what can start again is not kept."""
        if self._saved is not None:
            self._backward = self._running = None

    def program_for(self, made_for: Tangents) -> Program:
        """A program whose backward goes on from this forward, made for these tangents."""
        return self.program if made_for == self.program.tangents else self._backward_for(made_for)

    def launch(self, program: Program, tangents: Mapping[int, torch.Tensor | None], *, again: bool) -> Running:
        """Start a program's backward from tangents; `again`: what was saved is kept for another start."""
        if self._saved is None:
            raise RuntimeContractError(
                "the gradient of an output that another output is computed from came in another form than in the steps "
                "before (or came, or did not come at all), and what forward saved is freed. Run forward again: it is "
                "planned for this now. Or pass retain_graph=True to backward"
            )
        emitted = program.emitted
        boxed: list[Any] = [*self._saved, *(self._given[i] for i in emitted.given)]
        boxed += [None if i in program.exchanges else tangents[i] for i in emitted.tangents]
        if not again:
            self._saved = None
            if self._to_leaves:
                self._release()
        return Running(program.executable.backward(boxed, kept=again), self.place)

    def parts(self, position: int) -> list[torch.Tensor | None]:
        """What backward has of the gradient of a head's output, for autograd to add up; None where there is no more."""
        assert self._backward is not None
        (output,) = self.program.heads[position]
        parts = self._backward.parts(output)
        return parts + [None] * (self.program.leads[output].ways - len(parts))

    def _check_unchanged(self) -> None:
        """Raise an error if backward can't compute what eager would, since something was changed meanwhile."""
        if torch.is_grad_enabled():
            raise RuntimeContractError(
                "backward with create_graph=True (a gradient of gradients) is not supported by an optimized module. "
                "Use the plain model, which shares its parameters, for that step"
            )
        versions = versions_of([self._given[i] for i in self.program.emitted.given])
        if versions != self._given_versions:
            changed = next(
                self.program.roles.inputs[i]
                for i, now, then in zip(self.program.emitted.given, versions, self._given_versions, strict=True)
                if now != then
            )
            name = changed.path or f"number {changed.index}"
            raise RuntimeContractError(
                f"{changed.kind.value} {name} was changed in place between forward and backward, which needs its old "
                "value"
            )
        for reference, version in self._watched:
            output = reference()
            if output is not None and version_of(output) != version:
                raise RuntimeContractError(
                    "an output of the model was changed in place between forward and backward, which needs its old "
                    "value. Clone it first"
                )

    def finish_stage(self, index: int, count: int) -> tuple[torch.Tensor | None, ...]:
        """Run backward to the end of a stage; its gradients, which nobody else holds."""
        if self._backward is not None:
            self._running, self._backward = self._backward.all_there(), None
            if not backward_keeps_graph():
                self._saved = None
        if self._running is None:
            raise RuntimeContractError("backward was entered in the middle; differentiate the outputs of the model")
        try:
            finished = self._running.advance()
        except BaseException:
            self._running = None
            raise
        if index == count - 1:
            self._running = None
            if self._saved is None:
                self._release()
        leaves, behind = self.program.emitted.stages[index].inputs, self._behind
        gradients = tuple(finished)
        finished.clear()
        if behind is not None:
            gradients = tuple(g if i in behind else None for i, g in zip(leaves, gradients, strict=True))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                spare_hooks(gradient_hooks_of(self._given[leaf]))
        return gradients

    def stage_count(self) -> int:
        """How many stages backward has."""
        return len(self.program.emitted.stages)


def _sharing_memory(outputs: Sequence[torch.Tensor], require_grad: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    """The outputs, autograd knowing which share memory: it refuses to change one in place where others are views of it.

    Those whose elements are of another form (views as real numbers, conjugates) are left alone.
    """
    first: dict[int | None, torch.Tensor] = {}
    known = []
    for output, requires_grad in zip(outputs, require_grad, strict=True):
        base = first.setdefault(storage_key(output), output)
        if base is output or _elements(base) != _elements(output):
            known.append(output)
            continue
        view = torch.as_strided(base, output.shape, output.stride(), output.storage_offset())
        known.append(view if requires_grad else view.detach())
    return tuple(known)


def _elements(tensor: torch.Tensor) -> tuple[torch.dtype, bool, bool]:
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


class _Head(torch.autograd.Function):
    """Hands out outputs, the first of its kind after it has run forward; in backward takes their gradients."""

    @staticmethod
    def forward(ctx: Any, step: _Step, position: int, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = step.outputs(position)
        ctx.step, ctx.position = step, position
        ctx.set_materialize_grads(False)
        roles, heads = step.program.roles.outputs, step.program.heads
        ctx.mark_non_differentiable(
            *(o for o, i in zip(outputs, heads[position], strict=True) if not roles[i].requires_grad)
        )
        return (*outputs, step.place.link()) if position < len(heads) - 1 else (*outputs,)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        step: _Step = ctx.step
        came = list(gradients)
        follows = ctx.position < len(step.program.heads) - 1 and came.pop() is not None
        to_leaves = not step.program.leads or will_run(_first_stage(ctx))
        step.arrived(ctx.position, came, follows=follows, to_leaves=to_leaves)
        return None, None, step.place.link()


def _first_stage(node: Any) -> Any:
    """The node of the first stage, behind a head's."""
    for _ in range(2 * node.position + 1):
        (node, _), *_ = node.next_functions  # the link's
    return node


class _Parts(torch.autograd.Function):
    """Between two heads: in backward hands over what there is of the gradient of the output that comes next."""

    @staticmethod
    def forward(ctx: Any, step: _Step, position: int, *_: torch.Tensor) -> torch.Tensor:
        ctx.step, ctx.position = step, position
        return step.place.link()

    @staticmethod
    def backward(ctx: FunctionCtx, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        step: _Step = ctx.step  # type: ignore[attr-defined]
        return None, None, step.place.link(), *step.parts(ctx.position)  # type: ignore[attr-defined]


class _Stage(torch.autograd.Function):
    """A link of the chain: returns the gradients of its leaves."""

    @staticmethod
    def forward(ctx: Any, step: _Step, index: int, *_: torch.Tensor) -> torch.Tensor:
        ctx.step, ctx.index = step, index
        return step.place.link()

    @staticmethod
    def backward(ctx: FunctionCtx, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        step: _Step = ctx.step  # type: ignore[attr-defined]
        gradients = step.finish_stage(ctx.index, step.stage_count())  # type: ignore[attr-defined]
        return None, None, step.place.link(), *gradients


_apply_head, _apply_parts, _apply_stage = bare_apply(_Head), bare_apply(_Parts), bare_apply(_Stage)
