"""The module that stands in for the user's model: the same object in another class, with planned forward and backward.

The stand-in shares the model's whole `__dict__`, so parameters, buffers, submodules, flags and attributes are the same
in both, whichever of the two is changed. What fxckpt needs beside that lives in a slot, outside the dictionary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxckpt.capture.constants import only_value
from fxckpt.capture.structure import Structure, put_together, take_apart
from fxckpt.capture.watch import Signature, watch
from fxckpt.errors import CaptureError, InvalidScheduleError, PlanBypassedWarning, RuntimeContractError
from fxckpt.module.bypass import Bypasses
from fxckpt.module.front import NothingToPlan, Planning
from fxckpt.module.methods import Methods, watched_methods
from fxckpt.module.refused import check_plannable
from fxckpt.module.route import Route
from fxckpt.options import Options
from fxckpt.pipeline import Compiled, annotate, make_plan, make_program, profile_step
from fxckpt.profile.build import Profile
from fxckpt.rewrite.bridge import bridge
from fxckpt.runtime.autograd import Program, Tangents, run_forward
from fxckpt.steps.equivalence import check_same_step
from fxckpt.upstream.ambient import Ambient
from fxckpt.upstream.dynamo import NotTraced
from fxckpt.upstream.hooks import call_module
from fxckpt.upstream.ops.expect import UnexpectedValue

_SLOT = "_fxckpt"


def stand_in(model: nn.Module, options: Options) -> nn.Module:
    """A module that stands in for `model` and is planned by `options`, at its first call or by `prepare`."""
    plain = plain_model(model)
    check_plannable(plain)
    plain_class: Any = type(plain)
    kind = _stand_in_class(plain_class)
    module = object.__new__(kind)
    object.__setattr__(module, "__dict__", plain.__dict__)
    object.__setattr__(module, _SLOT, Planner(plain, options))
    return module


def planner_of(model: nn.Module) -> Planner | None:
    """The planner behind a stand-in, or None for other modules."""
    return getattr(model, _SLOT, None) if isinstance(model, _StandIn) else None


def plain_model(model: nn.Module) -> nn.Module:
    """The user's own model behind a stand-in; other modules are returned as they are."""
    planner = planner_of(model)
    return model if planner is None else planner.plain


class _StandIn:
    """What a stand-in does differently from the model's class."""

    _fxckpt: Planner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_module(self, args, kwargs)  # whatever `nn.Module.compile` left on the model

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        planner = self._fxckpt
        return stand_in(copy.deepcopy(planner.plain, memo), planner.options)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return stand_in, (self._fxckpt.plain, self._fxckpt.options)


class _Forward:
    """`forward` of a stand-in: planned on the module, the model's own on the class (whose signature people inspect).

    Whoever sets it on the module, as accelerate does to add autocast, wraps the planned one.
    """

    def __init__(self, plain_forward: Callable[..., Any]) -> None:
        self._plain_forward = plain_forward

    def __get__(self, module: Any, _: Any = None) -> Callable[..., Any]:
        return self._plain_forward if module is None else module._fxckpt.forward

    def __set__(self, module: Any, forward: Callable[..., Any]) -> None:
        module._fxckpt.set_forward(forward)

    def __delete__(self, module: Any) -> None:
        module._fxckpt.set_forward(None)


@functools.cache
def _stand_in_class(kind: Any) -> type[nn.Module]:
    body = {
        "__slots__": (_SLOT,),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "forward": _Forward(kind.forward),
        **watched_methods(kind),
    }
    return type(kind.__name__, (_StandIn, kind), body)


@dataclass
class _Entry:
    """All that is known for one input signature: what to run now, and captures and backwards from other outputs."""

    signature: Signature
    ambient: Ambient
    expected: Compiled
    gradients_allocated: bool
    captured: dict[Tangents, Compiled]
    bridges: dict[tuple[int, Tangents], Program] = field(default_factory=dict)


class Planner:
    """Plans and runs a model's training step, one plan for each input signature."""

    def __init__(self, plain: nn.Module, options: Options) -> None:
        self.plain, self.options = plain, options
        self.planning = Planning(options)
        self.bypasses = Bypasses()
        self.methods = Methods(plain, self.planning, self.bypasses)
        self.route = Route(plain.forward, plain, self.planning, self.bypasses, self._captured_as_before)
        self.forward = self._own_forward = self.planned_forward()
        self._entries: dict[tuple[Signature, bool], _Entry | None] = {}
        self._asked: dict[Signature, tuple[int, ...]] = {}  # arguments whose values the model asks for
        self._lock = threading.Lock()
        self._watch = watch(plain)

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
        compiled = entry.expected
        given = self._watch.given(compiled.profile.joint.roles.inputs, tensors)
        other_backward = functools.partial(self._backward_for, entry, compiled, args, kwargs)
        try:
            results = run_forward(compiled.program, given, other_backward)
        except UnexpectedValue:
            results = None
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
            *(entry.expected for entry in self._entries.values() if entry is not None),
        ]

    def _entry(
        self, tensors: list[torch.Tensor], structure: Structure, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> _Entry | None:
        if self._watch.changed():
            self._watch, self._entries, self._asked = watch(self.plain), {}, {}
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
        if not any(t.requires_grad for t in (*tensors, *self.plain.parameters())):
            return None
        signature, allocated = key
        twin = self._entries.get((signature, not allocated))
        if twin is not None:  # the same step, its gradients accounted for in the other way
            profile = twin.expected.profile
            profile = replace(profile, graph=profile.graph.with_gradients(allocated))
        else:
            profile = profile_step(
                self.plain, args, kwargs, self.options, forward=self.plain.forward, gradients_allocated=allocated
            )
        if all(output.tangent is None for output in profile.joint.roles.outputs):
            return None
        compiled = self._compile(profile, self.options)
        entry = _Entry(signature, Ambient.now(), compiled, allocated, {compiled.program.tangents: compiled})
        if self.options.verify:
            self._verify(entry, args, kwargs)
        return entry

    def _verify(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Compare a step with the plain model's; what is planned meanwhile for other outputs is forgotten."""
        trial = replace(entry, captured=dict(entry.captured), bridges={})
        other_backward = functools.partial(self._other_backward, trial, entry.expected, args, kwargs)
        tensors, structure = take_apart((tuple(args), kwargs))
        check_same_step(self.plain, entry.expected, structure, tensors, other_backward)
        self.planning.latest = entry.expected

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
        self.planning.latest = Compiled(profile, plan, program)
        return self.planning.latest

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
        options = self.options
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
                self.plain,
                args,
                kwargs,
                options,
                forward=self.plain.forward,
                gradients_allocated=entry.gradients_allocated,
                tangents={number: stride for number, stride in numbered.items() if number is not None},
            )
        return self._compile(profile, options)
