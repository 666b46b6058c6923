"""Run emitted graphs under autograd.

Forward is one `autograd.Function` without gradients of its own. Backward is a chain of small ones, a stage each, linked
by an empty token tensor on the model's device (see `place`): the engine runs the first, which takes the tangents, then
stage after stage. A stage returns the gradients that it finished, and the engine accumulates them, runs their hooks and
frees them before the next stage starts.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from fxckpt.capture.roles import Result, Roles
from fxckpt.errors import RuntimeContractError
from fxckpt.rewrite.backends import Executable
from fxckpt.rewrite.emitted import Emitted
from fxckpt.runtime.leading import check_no_hooks, refuse_ways_between
from fxckpt.runtime.place import Place
from fxckpt.upstream.aot import replayed_view
from fxckpt.upstream.dispatch import backward_keeps_graph, bare_apply, plain_execution, when_backward_ends
from fxckpt.upstream.hooks import gradient_hooks_of
from fxckpt.upstream.ops.expect import UnexpectedValue
from fxckpt.upstream.ops.layout import layout_of
from fxckpt.upstream.ops.rng import KeptState
from fxckpt.upstream.tensors import copy_all, storage_key, version_of, versions_of

Tangents = frozenset[tuple[int, tuple[int, ...]]]
"""What backward starts from: indices into `Roles.outputs`, and the layouts of their tangents."""


@dataclass(frozen=True)
class Program:
    """A plan made runnable: what runs it, and the roles of what goes in and comes out."""

    roles: Roles
    executable: Executable

    @cached_property
    def emitted(self) -> Emitted:
        """The graphs that are run."""
        return self.executable.emitted

    @cached_property
    def tangents(self) -> Tangents:
        """The tangents that backward starts from."""
        outputs = self.roles.outputs
        traced = {i: o.tangent.meta["val"] for i, o in enumerate(outputs) if o.tangent is not None}
        return frozenset((i, layout_of(traced[i])) for i in self.emitted.tangents)

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the inputs are."""
        return tuple(dict.fromkeys(given.node.meta["val"].device for given in self.roles.inputs))

    @cached_property
    def updated(self) -> tuple[int, ...]:
        """Indices of the inputs that forward changes."""
        return tuple(i for i, given in enumerate(self.roles.inputs) if given.update is not None)


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
    outputs = _apply_head(step, token)
    step.watch(outputs, token.grad_fn)
    return [_result(result, outputs, given) for result in program.roles.results]


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
        self._program, self._given, self._backward_for = program, list(given), backward_for
        self.place = Place.of(program.devices)
        self._released = released
        self._saved: list[torch.Tensor] | None = None
        self._given_versions: list[int] = []
        self._watched: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._leading_on: list[weakref.ref[torch.Tensor]] = []
        self._running: Iterator[list[torch.Tensor | None]] | None = None

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        """What was saved is kept no longer; whoever wants to know is told once."""
        released, self._released = self._released, None
        if released is not None:
            released()

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Compute outputs, copy updates into the inputs that forward changes, and keep what backward reads."""
        emitted, roles = self._program.emitted, self._program.roles
        updated = self._program.updated
        undone = _draws_undone(self._given) if emitted.checks_values else contextlib.nullcontext()
        with plain_execution(), undone:
            values: tuple[torch.Tensor, ...] = self._program.executable.forward(list(self._given))
        if updated:
            with torch.no_grad():
                copy_all([self._given[i] for i in updated], values[: len(updated)])
        self._given_versions = versions_of([self._given[i] for i in emitted.given])
        first, last = len(updated), len(updated) + len(roles.outputs)
        self._saved = list(values[last:])
        return _sharing_memory(values[first:last], [role.requires_grad for role in roles.outputs])

    def watch(self, outputs: Sequence[torch.Tensor], first_stage: Any) -> None:
        """Remember the versions of the outputs that backward reads, and from which of them others are computed."""
        roles = self._program.roles.outputs
        self._leading_on = [weakref.ref(o) for o, role in zip(outputs, roles, strict=True) if role.leads_on]
        refuse_ways_between(outputs, self._leading_on, first_stage)
        read = (outputs[i] for i in self._program.emitted.read_outputs)
        self._watched = [(weakref.ref(output), version_of(output)) for output in read]

    def start_backward(self, tangents: list[torch.Tensor | None]) -> None:
        """Begin a backward from these tangents (None for outputs that nobody differentiated)."""
        self._check_backward()
        assert self._saved is not None
        present = frozenset((i, layout_of(tangent)) for i, tangent in enumerate(tangents) if tangent is not None)
        program = self._program if present == self._program.tangents else self._backward_for(present)
        emitted = program.emitted
        boxed = list(self._saved)
        kept = backward_keeps_graph()
        if not kept:
            self._saved = None
            self._release()
        boxed += [self._given[i] for i in emitted.given]
        boxed += [t for i in emitted.tangents if (t := tangents[i]) is not None]
        tangents.clear()
        self._running = program.executable.backward(boxed, kept=kept)

    def _check_backward(self) -> None:
        if torch.is_grad_enabled():
            raise RuntimeContractError(
                "backward with create_graph=True (a gradient of gradients) is not supported by an optimized module. "
                "Use the plain model, which shares its parameters, for that step"
            )
        if self._saved is None:
            raise RuntimeContractError(
                "backward through the same forward a second time, but what it saved is freed. "
                "Pass retain_graph=True to the first backward"
            )
        versions = versions_of([self._given[i] for i in self._program.emitted.given])
        if versions != self._given_versions:
            changed = next(
                self._program.roles.inputs[i]
                for i, now, then in zip(self._program.emitted.given, versions, self._given_versions, strict=True)
                if now != then
            )
            name = changed.path or f"number {changed.index}"
            raise RuntimeContractError(
                f"{changed.kind.value} {name} was changed in place between forward and backward, which needs its old "
                "value"
            )
        check_no_hooks(self._leading_on)
        for reference, version in self._watched:
            output = reference()
            if output is not None and version_of(output) != version:
                raise RuntimeContractError(
                    "an output of the model was changed in place between forward and backward, which needs its old "
                    "value. Clone it first"
                )

    def finish_stage(self, index: int, count: int) -> tuple[torch.Tensor | None, ...]:
        """Run backward to the end of a stage; its gradients, which nobody else holds."""
        if self._running is None:
            raise RuntimeContractError("backward was entered in the middle; differentiate the outputs of the model")
        try:
            with plain_execution(), self.place.entered() if self.place.streams else contextlib.nullcontext():
                finished = next(self._running)
        except BaseException:
            self._running = None
            raise
        if index == count - 1:
            self._running = None
        gradients = tuple(finished)
        finished.clear()
        for leaf, gradient in zip(self._program.emitted.stages[index].inputs, gradients, strict=True):
            if gradient is None:
                _spare_hooks(self._given[leaf])
        return gradients

    def stage_count(self) -> int:
        """How many stages backward has."""
        return len(self._program.emitted.stages)


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


def _spare_hooks(tensor: torch.Tensor) -> None:
    """Until backward ends, don't call the tensor's hooks without a gradient: the engine would, and eager does not."""
    hooks = gradient_hooks_of(tensor)
    if not hooks:
        return
    before = dict(hooks)
    hooks.update({key: functools.partial(_if_there, hook) for key, hook in before.items()})

    def put_back() -> None:
        hooks.update({key: hook for key, hook in before.items() if key in hooks})

    when_backward_ends(put_back)


def _if_there(hook: Callable[[torch.Tensor], Any], gradient: torch.Tensor | None) -> Any:
    return None if gradient is None else hook(gradient)


class _Head(torch.autograd.Function):
    """Runs forward; in backward takes the tangents and lets the stages go."""

    @staticmethod
    def forward(ctx: Any, step: _Step, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = step.forward()
        ctx.step = step
        ctx.set_materialize_grads(False)
        roles = step._program.roles
        ctx.mark_non_differentiable(
            *(o for o, role in zip(outputs, roles.outputs, strict=True) if not role.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[None, torch.Tensor]:
        ctx.step.start_backward(list(tangents))
        return None, ctx.step.place.link()


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


_apply_head, _apply_stage = bare_apply(_Head), bare_apply(_Stage)
