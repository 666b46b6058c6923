"""Models that Dynamo can't trace: their forward is called once while autograd and all its ops are traced.

Nothing watches what such a forward reads from Python, so what can be had is looked at at each call: forms of inputs and
parameters, modes, flags, hooks, and the numbers, flags and texts that are attributes of modules.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxckpt.capture.constants import only_value
from fxckpt.capture.front import NewMemoryError
from fxckpt.capture.structure import Structure, put_together, take_apart
from fxckpt.capture.watch import Signature, watch
from fxckpt.errors import (
    CaptureError,
    FxckptError,
    InvalidScheduleError,
    RuntimeContractError,
    UnguardedCaptureWarning,
)
from fxckpt.module.bypass import Bypasses
from fxckpt.module.front import Planning
from fxckpt.options import Options
from fxckpt.pipeline import Compiled, annotate, make_plan, make_program, profile_step
from fxckpt.profile.build import Profile
from fxckpt.rewrite.bridge import bridge
from fxckpt.runtime.autograd import Program, Tangents, run_forward
from fxckpt.steps.equivalence import check_same_step
from fxckpt.upstream.ambient import Ambient


@dataclass
class _Entry:
    """All that is known for one input signature: what to run now, and captures and backwards from other outputs."""

    signature: Signature
    ambient: Ambient
    expected: Compiled
    gradients_allocated: bool
    captured: dict[Tangents, Compiled]
    bridges: dict[tuple[int, Tangents], Program] = field(default_factory=dict)


class Unguarded:
    """Plans and runs the steps of a model that Dynamo can't trace, one plan for each input signature."""

    def __init__(self, plain: nn.Module, planning: Planning, bypasses: Bypasses) -> None:
        self._plain, self._planning, self._bypasses = plain, planning, bypasses
        self._entries: dict[tuple[Signature, bool], _Entry | None] = {}
        self._asked: dict[Signature, tuple[int, ...]] = {}  # arguments whose values the model asks for
        self._lock = threading.Lock()
        self._watch = watch(plain)

    def serves(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether such a call was planned here before."""
        if not self._entries or self._watch.changed():
            return False
        tensors, structure = take_apart((tuple(args), kwargs))
        form, allocated = self._watch.signature(tensors, structure), self._watch.gradients_allocated()
        return (self._with_values(form, tensors), allocated) in self._entries

    def call(self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The model's forward, planned; `reason` is why it is planned here, if it wasn't before."""
        entry = self.prepare(reason, args, kwargs)
        if entry is None:
            return self._plain.forward(*args, **kwargs)
        compiled = entry.expected
        tensors, _ = take_apart((tuple(args), kwargs))
        given = self._watch.given(compiled.profile.joint.roles.inputs, tensors)
        other_backward = functools.partial(self._backward_for, entry, compiled, args, kwargs)
        self._planning.runs += 1
        results = run_forward(compiled.program, given, other_backward)
        return put_together(compiled.profile.joint.outputs, iter(results))

    def prepare(self, reason: Exception | None, args: Sequence[Any], kwargs: dict[str, Any]) -> _Entry | None:
        """Capture and plan for these arguments; None where there is nothing to differentiate."""
        if isinstance(reason, NewMemoryError):
            raise reason
        planned = len(self._entries)
        try:
            tensors, structure = take_apart((tuple(args), kwargs))
            entry = self._entry(tensors, structure, args, kwargs)
        except Exception as error:
            if isinstance(error, FxckptError) and not isinstance(error, CaptureError):
                raise
            what = str(error) if isinstance(error, CaptureError) else "the model can't be captured as one graph"
            if _has_generator((args, kwargs, [list(vars(m).values()) for m in self._plain.modules()])):
                what = (
                    "the model can't be captured as one graph: it draws from a torch.Generator, which a graph can't "
                    "hold. Draw outside of the model and pass what is drawn, or use torch's default generator"
                )
            raise CaptureError(
                f"{what}. TorchDynamo says: {reason}. With graph_breaks=True it is planned in parts, up to there and "
                "behind"
            ) from error
        if entry is not None and len(self._entries) > planned:
            _say_unguarded(reason)
        return entry

    def compiled(self) -> list[Compiled]:
        """What was planned so far, a plan for each input signature."""
        return [entry.expected for entry in self._entries.values() if entry is not None]

    def _entry(
        self, tensors: list[torch.Tensor], structure: Structure, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> _Entry | None:
        if self._watch.changed():
            self._watch, self._entries, self._asked = watch(self._plain), {}, {}
        form, allocated = self._watch.signature(tensors, structure), self._watch.gradients_allocated()
        with contextlib.suppress(KeyError):
            return self._entries[self._with_values(form, tensors), allocated]
        with self._lock:
            signature = self._with_values(form, tensors)
            if (signature, allocated) not in self._entries:
                entry = self._make_entry((signature, allocated), tensors, args, kwargs)
                if entry is not None:
                    asked = entry.expected.profile.joint.asked
                    self._asked[form] = tuple(sorted(asked.union(self._asked.get(form, ()))))
                    entry.signature = signature = self._with_values(form, tensors)
                self._entries[signature, allocated] = entry
            return self._entries[signature, allocated]

    def _with_values(self, form: Signature, tensors: list[torch.Tensor]) -> Signature:
        """A call's signature, given that of its form: with the values of arguments that the model asks for."""
        return form, tuple([only_value(tensors[number]) for number in self._asked.get(form, ())])

    def _make_entry(
        self,
        key: tuple[Signature, bool],
        tensors: list[torch.Tensor],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> _Entry | None:
        """Capture and plan; None where there is nothing to differentiate."""
        self._watch.check()
        if not any(t.requires_grad for t in (*tensors, *self._plain.parameters())):
            return None
        signature, allocated = key
        twin = self._entries.get((signature, not allocated))
        if twin is not None:  # the same step, its gradients accounted for in the other way
            profile = twin.expected.profile
            profile = replace(profile, graph=profile.graph.with_gradients(allocated))
        else:
            profile = profile_step(
                self._plain,
                args,
                kwargs,
                self._planning.options,
                forward=self._plain.forward,
                gradients_allocated=allocated,
            )
        if all(output.tangent is None for output in profile.joint.roles.outputs):
            return None
        compiled = self._compile(profile, self._planning.options)
        entry = _Entry(signature, Ambient.now(), compiled, allocated, {compiled.program.tangents: compiled})
        if self._planning.options.verify:
            self._verify(entry, args, kwargs)
        return entry

    def _verify(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Compare a step with the plain model's; what is planned meanwhile for other outputs is forgotten."""
        trial = replace(entry, captured=dict(entry.captured), bridges={})
        other_backward = functools.partial(self._other_backward, trial, entry.expected, args, kwargs)
        tensors, structure = take_apart((tuple(args), kwargs))
        check_same_step(self._plain, entry.expected, structure, tensors, other_backward)
        self._planning.latest = entry.expected

    def _compile(self, profile: Profile, options: Options) -> Compiled:
        similar = [entry.expected.plan for entry in self._entries.values() if entry is not None]
        plan = make_plan(profile, options, similar)
        inputs = profile.joint.roles.inputs
        hooked = self._watch.hooked_parameters()
        program = make_program(
            profile,
            plan.schedule,
            frozenset(n for n, i in enumerate(inputs) if i.gradient is not None and i.path in hooked),
        )
        annotate(profile, plan)
        self._planning.latest = Compiled(profile, plan, program)
        return self._planning.latest

    def _backward_for(
        self, entry: _Entry, ran: Compiled, args: Sequence[Any], kwargs: dict[str, Any], present: Tangents
    ) -> Program:
        """A backward from other outputs, continuing from the forward that ran; the next forward is planned for them."""
        with self._lock:
            return self._other_backward(entry, ran, args, kwargs, present)

    def _other_backward(
        self, entry: _Entry, ran: Compiled, args: Sequence[Any], kwargs: dict[str, Any], present: Tangents
    ) -> Program:
        if present not in entry.captured:
            entry.captured[present] = self._recapture(entry, ran, args, kwargs, present)
        other = entry.expected = entry.captured[present]
        if other is ran:
            return ran.program
        key = (id(ran), present)
        if key not in entry.bridges:
            try:
                emitted = bridge(ran.program.emitted, other.profile)
            except InvalidScheduleError as error:
                raise RuntimeContractError(
                    f"backward started from other outputs than expected, and this forward can't serve it: {error}. "
                    "Run forward again: it is planned for them now"
                ) from error
            entry.bridges[key] = Program(other.profile.joint.roles, emitted)
        return entry.bridges[key]

    def _recapture(
        self, entry: _Entry, ran: Compiled, args: Sequence[Any], kwargs: dict[str, Any], present: Tangents
    ) -> Compiled:
        """Capture and plan the step with backward starting from the tangents `present`."""
        options = self._planning.options
        if options.plan is not None:  # it was made for the other outputs
            options = replace(options, plan=None, budget=options.plan.budget_bytes)
        outputs = ran.profile.joint.roles.outputs
        numbered = {outputs[index].tangent_number: stride for index, stride in present}
        with entry.ambient.restored(), torch.enable_grad():
            tensors, structure = take_apart((tuple(args), kwargs))
            if (
                self._watch.changed()
                or self._with_values(self._watch.signature(tensors, structure), tensors) != entry.signature
            ):
                raise RuntimeContractError(
                    "backward started from other outputs than expected, and the model was changed since forward (its "
                    "mode, what requires grad, hooks, types). Run forward again, or change the model after backward"
                )
            profile = profile_step(
                self._plain,
                args,
                kwargs,
                options,
                forward=self._plain.forward,
                gradients_allocated=entry.gradients_allocated,
                tangents={number: stride for number, stride in numbered.items() if number is not None},
            )
        return self._compile(profile, options)


def _has_generator(value: Any) -> bool:
    return any(isinstance(x, torch.Generator) for x in pytree.tree_leaves(value))


def _say_unguarded(reason: Exception | None) -> None:
    if reason is not None:
        warnings.warn(
            "TorchDynamo's way to capture the model failed, so it was captured by calling its forward once. Beside tensors, modes "
            "and the numbers, flags and texts that are attributes of modules, what forward reads from Python stays as "
            f"it is now, whatever changes. The reason: {reason}",
            UnguardedCaptureWarning,
            stacklevel=5,
        )
