"""Plans and runs a model's training step: the forward of a stand-in."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxckpt.capture.structure import Structure, put_together, take_apart
from fxckpt.core.plans import Plan
from fxckpt.errors import CaptureError, PlanBypassedWarning, RuntimeContractError
from fxckpt.module.bypass import Bypasses
from fxckpt.module.entries import Entries, Entry, Key
from fxckpt.module.front import NothingToPlan, Planning
from fxckpt.module.ledger import ledger
from fxckpt.module.methods import Methods
from fxckpt.module.route import Route
from fxckpt.options import Options
from fxckpt.pipeline import Compiled, annotate, make_plan, make_program, profile_step
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, Tangents, run_forward
from fxckpt.steps.equivalence import check_same_step
from fxckpt.upstream.dynamo import NotTraced
from fxckpt.upstream.ops.expect import UnexpectedValue


class Planner:
    """Plans and runs a model's training step, one plan for each input signature.

    Attributes:
        plain: the user's model.
        options: what was asked for.
        forward: what a stand-in's forward is: `planned_forward`, or what somebody has set in its place.
        latest: what was planned last.
    """

    def __init__(self, plain: nn.Module, options: Options) -> None:
        self.plain, self.options = plain, options
        self.planning = Planning(options)
        self.bypasses = Bypasses()
        self.methods = Methods(plain, self.planning, self.bypasses)
        self.route = Route(plain.forward, plain, self.planning, self.bypasses, self._captured_as_before)
        self.forward = self._own_forward = self.planned_forward()
        self._entries = Entries(plain)
        self._lock = threading.Lock()

    def planned_forward(self) -> Callable[..., Any]:
        """`call`, with the signature of the model's own forward."""
        forward = functools.partial(Planner.call, self)
        functools.update_wrapper(forward, self.plain.forward)
        return forward

    @property
    def latest(self) -> Compiled | None:
        """What was planned last."""
        return self.planning.latest

    def set_forward(self, forward: Callable[..., Any] | None) -> None:
        """Plan another function in forward's place; None for the model's own."""
        if forward is None or forward is self._own_forward:
            self.forward = self._own_forward
            return
        route = self.methods.route(forward, "forward was replaced by a function that can't be planned as a whole")
        self.forward = functools.partial(Route.called, route)
        functools.update_wrapper(self.forward, forward)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, planned. Without grad it is the plain forward."""
        return self.route.call(args, kwargs)

    def _captured_as_before(self, error: Exception, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Where Dynamo can't trace the model: its forward is called once while autograd and all ops are traced."""
        if os.environ.get("FXCKPT_WHY"):
            print("FALLBACK", type(error).__name__, error)
        tensors, structure = take_apart((args, kwargs))
        entry = self._entry(tensors, structure, args, kwargs)
        if entry is None:
            return self.plain.forward(*args, **kwargs)
        compiled, seat = ledger().take(entry)
        given = self._entries.watch.given(compiled.profile.joint.roles.inputs, tensors)
        other_backward = functools.partial(self._backward_for, entry, compiled, args, kwargs)
        try:
            results = run_forward(compiled.program, given, other_backward, seat.leave)
        except UnexpectedValue:
            results = None
            seat.leave()
        except BaseException:
            seat.leave()
            raise
        if results is None:
            return self._run_plain(args, kwargs)
        return put_together(compiled.profile.joint.outputs, iter(results))

    def _run_plain(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the model does where one of its checks of values fails: it raises its own error, if any."""
        outputs = self.plain.forward(*args, **kwargs)
        warnings.warn(
            "the model's forward found something wrong with values, but raised no error: it ran as it is, without its "
            "plan",
            PlanBypassedWarning,
            stacklevel=3,
        )
        return outputs

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Capture and plan for these arguments now."""
        with torch.enable_grad():
            try:
                self.route.front.prepare(args, kwargs)
                return
            except NothingToPlan:
                return
            except (NotTraced, CaptureError) as error:
                if os.environ.get("FXCKPT_WHY"):
                    print("FALLBACK", type(error).__name__, error)
            self._entry(*take_apart((tuple(args), kwargs)), args, kwargs)

    def compiled(self) -> list[Compiled]:
        """What was planned so far, a plan for each input signature."""
        return [
            *self.route.front.compiled(),
            *self.methods.compiled(),
            *(entry.expected for entry in self._entries),
        ]

    def _entry(
        self, tensors: list[torch.Tensor], structure: Structure, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Entry | None:
        self._entries.refresh()
        with contextlib.suppress(KeyError):
            return self._entries[self._entries.key(tensors, structure)]
        with self._lock:
            key = self._entries.key(tensors, structure)
            if key not in self._entries:
                self._entries.add(key, self._make_entry(key, tensors, args, kwargs), tensors)
            return self._entries[self._entries.key(tensors, structure)]

    def _make_entry(
        self, key: Key, tensors: list[torch.Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Entry | None:
        """Capture and plan; None where there is nothing to differentiate."""
        self._entries.watch.check()
        if not any(t.requires_grad for t in (*tensors, *self.plain.parameters())):
            return None
        signature, allocated = key
        twin = self._entries.twin(key)
        if twin is not None:
            profile = twin.expected.profile
            profile = replace(profile, graph=profile.graph.with_gradients(allocated))
        else:
            profile = profile_step(
                self.plain, args, kwargs, self.options, forward=self.plain.forward, gradients_allocated=allocated
            )
        if all(output.tangent is None for output in profile.joint.roles.outputs):
            return None
        compiled = self._compile(profile, self.options)
        entry = Entry(self.planning, self.options, self._runnable, signature, allocated, compiled)
        entry.kin = entry.kin if twin is None else twin.kin
        if self.options.verify:
            self._verify(entry, args, kwargs)
        return entry

    def _verify(self, entry: Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Compare a step with the plain model's; what is planned meanwhile for other outputs is forgotten."""
        trial = replace(entry, captured=dict(entry.captured), bridges={})
        other_backward = functools.partial(self._other_backward, trial, entry.expected, args, kwargs)
        tensors, structure = take_apart((tuple(args), kwargs))
        check_same_step(self.plain, entry.expected, structure, tensors, other_backward)
        self.planning.latest = entry.expected

    def _compile(self, profile: Profile, options: Options) -> Compiled:
        return self._runnable(profile, make_plan(profile, options, [compiled.plan for compiled in self.compiled()]))

    def _runnable(self, profile: Profile, plan: Plan) -> Compiled:
        hooked = self._entries.watch.hooked_parameters()
        inputs = enumerate(profile.joint.roles.inputs)
        waiting = frozenset(n for n, i in inputs if i.gradient is not None and i.path in hooked)
        program = make_program(profile, plan.timeline, waiting)
        annotate(profile, plan)
        self.planning.latest = Compiled(profile, plan, program)
        return self.planning.latest

    def _backward_for(
        self, entry: Entry, ran: Compiled, args: Sequence[Any], kwargs: dict[str, Any], present: Tangents
    ) -> Program:
        """A backward from other outputs than the forward that ran was planned for."""
        with self._lock:
            return self._other_backward(entry, ran, args, kwargs, present)

    def _other_backward(
        self, entry: Entry, ran: Compiled, args: Sequence[Any], kwargs: dict[str, Any], present: Tangents
    ) -> Program:
        return entry.continued(ran, present, functools.partial(self._recapture, entry, ran, args, kwargs, present))

    def _recapture(
        self, entry: Entry, ran: Compiled, args: Sequence[Any], kwargs: dict[str, Any], present: Tangents
    ) -> Compiled:
        """Capture and plan the step with backward starting from the tangents `present`."""
        options = self.options
        if options.plan is not None:  # it was made for the other outputs
            options = replace(options, plan=None, budget=options.plan.budget_bytes)
        outputs = ran.profile.joint.roles.outputs
        numbered = {outputs[index].tangent_number: stride for index, stride in present}
        with entry.ambient.restored(), torch.enable_grad():
            if not self._entries.serves(entry, *take_apart((tuple(args), kwargs))):
                raise RuntimeContractError(
                    "backward started from other outputs than expected, and the model was changed since forward (its "
                    "mode, what requires grad, hooks, types). Run forward again, or change the model after backward"
                )
            profile = profile_step(
                self.plain,
                args,
                kwargs,
                options,
                forward=self.plain.forward,
                gradients_allocated=entry.gradients_allocated,
                tangents={number: stride for number, stride in numbered.items() if number is not None},
            )
        return self._compile(profile, options)
