"""One graph of Dynamo's, planned and run. What Dynamo does not guard but a plan depends on is looked at at each call:
which gradients are allocated, hooks that change parameters, which attention kernels may run.
"""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt.capture.front import Lifted
from fxckpt.capture.roles import Arrival, InputKind
from fxckpt.core.plans import Plan
from fxckpt.module.entries import Entry
from fxckpt.module.planning import Planning
from fxckpt.pipeline import Compiled, profile_of
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, Tangents
from fxckpt.upstream.ambient import Ambient
from fxckpt.upstream.dynamo import NOT_MEANWHILE, TracedGraph
from fxckpt.upstream.hooks import with_accumulation_hooks

PREPARING: contextvars.ContextVar[bool] = contextvars.ContextVar("PREPARING", default=False)
"""Whether calls are made to plan only: `Prepared` ends them."""
CHECK: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("CHECK", default=None)
"""Compares what is being traced with the model, at most once a call."""
_Key = tuple[Any, ...]


class Prepared(BaseException):
    """Ends a call that was made to plan: nothing has run."""


class NothingToPlan(Exception):  # noqa: N818 - caught, and answered by the plain forward
    """Nothing that the function computes can be differentiated."""


class PlannedGraph:
    """One graph of Dynamo's, with its plans for each state of what Dynamo does not guard."""

    def __init__(self, planning: Planning, graph: TracedGraph, model: nn.Module | None) -> None:
        self._planning = planning
        self._lifted = Lifted(graph, model)
        given = self._lifted.given
        self._parameter_places = [i for i, x in enumerate(given) if x.kind is InputKind.PARAMETER]
        self._arguments = self._lifted.arguments
        self._entries: dict[_Key, Entry | None] = {}
        self._orders: dict[int, tuple[int, ...]] = {}

    def run_weakly(self) -> Callable[..., Any]:
        """What Dynamo is given to keep. It keeps it out of the garbage collector's sight, so this holds nothing."""
        reference = weakref.ref(self)

        def run(*inputs: torch.Tensor) -> Any:
            planned = reference()
            assert planned is not None
            return planned.run(inputs)

        return run

    def entries(self) -> Iterator[Entry]:
        """What is planned."""
        return (entry for entry in self._entries.values() if entry is not None)

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The graph's outputs."""
        if not torch.is_grad_enabled():
            return self._lifted.run(inputs)
        key = self._key(inputs)
        try:
            entry = self._entries[key]
        except KeyError:
            entry = self._entry(key, inputs)
        if PREPARING.get():
            raise Prepared
        if entry is None:
            if self._planning.options.graph_breaks:
                return self._lifted.run(inputs)
            raise NothingToPlan
        self._planning.runs += 1
        self._planning.used(entry)
        return entry.run(
            lambda compiled: [inputs[i] for i in self._orders[id(compiled)]],
            functools.partial(self._backward_for, inputs, entry),
        )

    def _key(self, inputs: Sequence[torch.Tensor]) -> _Key:
        parameters = [inputs[i] for i in self._parameter_places]
        return (
            any(p.grad is not None for p in parameters),
            with_accumulation_hooks(zip(self._parameter_places, parameters, strict=True)),
            tuple([inputs[i].is_leaf for i in self._arguments]),
            Ambient.now(),
        )

    def _entry(self, key: _Key, inputs: Sequence[torch.Tensor]) -> Entry | None:
        with self._planning.lock, NOT_MEANWHILE:
            if key not in self._entries:
                entry = self._entries[key] = self._make_entry(key, inputs)
                if entry is not None:
                    self._planning.keep(self, key, entry)
            return self._entries[key]

    def forget(self, key: _Key) -> None:
        """Drop the plans of an entry; the next call that needs them makes them anew."""
        entry = self._entries.pop(key, None)
        for compiled in () if entry is None else entry.all_compiled():
            self._orders.pop(id(compiled), None)

    def _make_entry(self, key: _Key, inputs: Sequence[torch.Tensor]) -> Entry | None:
        if not any(x.requires_grad for x in inputs):
            return None
        allocated, *rest = key
        entry = self._planning.entry(
            key,
            self._entries.get((not allocated, *rest)),
            lambda: self._profile(key, inputs),
            functools.partial(self._compile, key),
            functools.partial(self._runnable, key),
            gradients_allocated=allocated,
        )
        if entry is not None and self._planning.options.verify:
            arguments = tuple(inputs[i] for i in self._arguments)
            other_backward = functools.partial(self._other_backward, inputs)
            self._planning.verify(self._lifted.held, entry, (arguments, {}), other_backward)
            check = CHECK.get()
            if check is not None:
                CHECK.set(None)
                check()
        return entry

    def _profile(
        self, key: _Key, inputs: Sequence[torch.Tensor], tangents: dict[int, Arrival] | None = None
    ) -> Profile:
        joint = self._lifted.capture(inputs, tangents, lowered=self._planning.options.fuses)
        parameters = [inputs[i] for i in self._parameter_places]
        return profile_of(
            joint,
            self._planning.options,
            parameters,
            gradients_allocated=key[0],
            unused_bytes=self._lifted.unused_bytes,
            given=self._lifted.by_node(joint, inputs),
        )

    def _compile(self, key: _Key, profile: Profile, *, other_outputs: bool = False) -> Compiled:
        hooked = self._hooked(profile, key)
        return self._ordered(self._planning.compile(profile, hooked, other_outputs=other_outputs))

    def _runnable(self, key: _Key, profile: Profile, plan: Plan) -> Compiled:
        return self._ordered(self._planning.runnable(profile, plan, self._hooked(profile, key)))

    def _hooked(self, profile: Profile, key: _Key) -> frozenset[int]:
        order = self._lifted.order(profile.joint.roles.inputs)
        return frozenset(n for n, i in enumerate(order) if i in key[1])

    def _ordered(self, compiled: Compiled) -> Compiled:
        self._orders[id(compiled)] = self._lifted.order(compiled.profile.joint.roles.inputs)
        return compiled

    def _backward_for(self, inputs: Sequence[torch.Tensor], entry: Entry, ran: Compiled, present: Tangents) -> Program:
        with self._planning.lock, NOT_MEANWHILE:
            return self._other_backward(inputs, entry, ran, present)

    def _other_backward(
        self, inputs: Sequence[torch.Tensor], entry: Entry, ran: Compiled, present: Tangents
    ) -> Program:
        return entry.continued(ran, present, functools.partial(self._recapture, inputs, entry, ran, present))

    def _recapture(self, inputs: Sequence[torch.Tensor], entry: Entry, ran: Compiled, present: Tangents) -> Compiled:
        """Capture and plan the step with backward starting from the tangents `present`."""
        key: Any = entry.signature
        with entry.ambient.restored(), torch.enable_grad():
            profile = self._profile(key, inputs, ran.numbered(present))
        return self._compile(key, profile, other_outputs=True)
