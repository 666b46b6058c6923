"""A function's training step, planned behind Dynamo: it guards what was read, replays what was changed, traces anew.

Each graph that Dynamo makes is captured, planned and run as one step. What Dynamo does not guard but a plan depends on
is looked at here, at each call: which gradients are allocated, hooks that change parameters, which attention kernels
may run.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import random
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxckpt.capture.front import Lifted
from fxckpt.capture.roles import InputKind
from fxckpt.capture.structure import take_apart
from fxckpt.core.plans import Plan
from fxckpt.errors import ReplanningWarning
from fxckpt.module.entries import Entry
from fxckpt.module.function import FunctionModule
from fxckpt.module.refused import check_plannable
from fxckpt.options import Options
from fxckpt.pipeline import Compiled, annotate, make_plan, make_program, profile_of
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, Tangents
from fxckpt.steps.equivalence import check_same_graph, check_same_step
from fxckpt.upstream.ambient import Ambient
from fxckpt.upstream.dynamo import NOT_MEANWHILE, Traced, TracedGraph
from fxckpt.upstream.hooks import with_accumulation_hooks

_preparing: contextvars.ContextVar[bool] = contextvars.ContextVar("_preparing", default=False)
_check: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("_check", default=None)
"""Compares what is being traced with the model, at most once a call."""
_Key = tuple[Any, ...]


class _Planned(BaseException):
    """Ends a call that was made to plan: nothing has run."""


class NothingToPlan(Exception):  # noqa: N818 - caught, and answered by the plain forward
    """Nothing that the function computes can be differentiated."""


_MANY = 5
"""So many plans in a row, one a call, are worth a word."""
_GRAPHS_A_PLAN = 4


class Planning:
    """How a function's graphs are planned, and what was planned so far.

    Attributes:
        options: what the user asked for.
        latest: what was planned last.
        plans: the latest plans, since a graph of the same structure may take over another's.
        lock: held while something is planned.
        runs: how many graphs ran by a plan.
        kept: what can be forgotten, the least recently used first: graphs and keys of their entries.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.runs = 0
        self.kept: OrderedDict[int, tuple[weakref.ref[PlannedGraph], _Key]] = OrderedDict()
        self.latest: Compiled | None = None
        self.plans: deque[Plan] = deque(maxlen=options.max_plans)
        self.lock = threading.RLock()

    def keep(self, graph: PlannedGraph, key: _Key, entry: Entry) -> None:
        """A new entry is kept, and the one that was used least recently forgotten if there are too many."""
        self.kept[id(entry)] = weakref.ref(graph), key
        while len(self.kept) > self.options.max_plans:
            _, (reference, old) = self.kept.popitem(last=False)
            owner = reference()
            if owner is not None:
                owner.forget(old)

    def used(self, entry: Entry) -> None:
        """An entry is used."""
        with contextlib.suppress(KeyError):  # another thread may just have forgotten it
            self.kept.move_to_end(id(entry))

    def compile(self, profile: Profile, hooked: frozenset[int], *, other_outputs: bool = False) -> Compiled:
        """A runnable plan of a profiled step.

        Args:
            profile: the step.
            hooked: indices of the inputs that hooks may change during backward.
            other_outputs: whether backward starts from others than the most likely ones. A plan that the user gave is
                for those; its budget holds for these, too.
        """
        options = self.options
        if other_outputs and options.plan is not None:
            options = replace(options, plan=None, budget=options.plan.budget_bytes)
        plan = make_plan(profile, options, self.plans)
        self.plans.append(plan)
        return self.runnable(profile, plan, hooked)

    def runnable(self, profile: Profile, plan: Plan, hooked: frozenset[int]) -> Compiled:
        """A plan of a profiled step made runnable; `hooked` as for `compile`."""
        program = make_program(profile, plan.timeline, hooked)
        annotate(profile, plan)
        self.latest = Compiled(profile, plan, program)
        return self.latest

    def entry(
        self,
        signature: Hashable,
        twin: Entry | None,
        profile: Callable[[], Profile],
        compile: Callable[[Profile], Compiled],  # noqa: A002
        runnable: Callable[[Profile, Plan], Compiled],
        *,
        gradients_allocated: bool,
    ) -> Entry | None:
        """What is planned for a form of call; None if nothing of it can be differentiated.

        Args:
            signature: of the calls that it will serve.
            twin: the entry of the same step, its gradients accounted for in the other way.
            profile: captures the step, where there is no twin.
            compile: plans it.
            runnable: makes a plan of it runnable.
            gradients_allocated: whether there are gradients to add to.
        """
        if twin is not None:
            found = twin.expected.profile
            found = replace(found, graph=found.graph.with_gradients(gradients_allocated))
        else:
            found = profile()
        if all(output.tangent is None for output in found.joint.roles.outputs):
            return None
        entry = Entry(self, self.options, runnable, signature, gradients_allocated, compile(found))
        entry.kin = entry.kin if twin is None else twin.kin
        return entry

    def verify(
        self,
        model: nn.Module,
        entry: Entry,
        given: tuple[Any, ...],
        other_backward: Callable[[Entry, Compiled, Tangents], Program],
    ) -> None:
        """Compare a step with the plain model's; what is planned meanwhile for other outputs is forgotten.

        Args:
            model: what is planned.
            entry: its plan.
            given: positional and keyword arguments.
            other_backward: what a backward from other outputs runs, given an entry and what ran.

        Raises:
            VerificationError: something differs.
        """
        trial = replace(entry, captured=dict(entry.captured), bridges={})
        tensors, structure = take_apart(given)
        check_same_step(
            model, entry.expected, structure, tensors, functools.partial(other_backward, trial, entry.expected)
        )
        self.latest = entry.expected


class Front:
    """A function and its plans, one for each graph that Dynamo makes of it.

    Attributes:
        planning: what was planned.
        draws: a graph has inputs that are drawn by Python's `random` before it runs.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module | None, planning: Planning) -> None:
        """`model` is the one whose paths name modules and parameters."""
        self.planning = planning
        self.draws = False
        self._function, self._model = function, model
        self._graphs: list[PlannedGraph] = []
        self._made_in_a_row = 0
        reference = weakref.ref(self)

        def make(graph: TracedGraph) -> Callable[..., Any]:
            owner = reference()
            assert owner is not None
            return owner._make(graph)

        self._traced = Traced(function, make, one_graph=not planning.options.graph_breaks)

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The function's result, planned.

        Raises:
            NotTraced: the function can't be traced.
            NothingToPlan: it computes nothing that can be differentiated.
            CaptureError: its graph can't be captured.
        """
        with self._checked(args, kwargs):
            return self._call(args, kwargs)

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if len(self._graphs) > _GRAPHS_A_PLAN * self.planning.options.max_plans:  # their programs are gone already
            self._traced.forget()
            self._graphs.clear()
        before = len(self._graphs)
        result = self._traced(*args, **kwargs)
        self._made_in_a_row = self._made_in_a_row + 1 if len(self._graphs) > before else 0
        if self._made_in_a_row == _MANY:
            warnings.warn(
                f"the last {_MANY} calls in a row were captured and planned anew each, at the cost of time and memory. "
                f"What changed last: {self._traced.why_again or 'unknown'}. Pass it as a tensor, or pad to few sizes",
                ReplanningWarning,
                stacklevel=6,
            )
        return result

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Plan for these arguments. Nothing is computed.

        Raises:
            NotTraced, CaptureError: as for `call`.
        """
        if self.planning.options.graph_breaks:  # what the second graph is given the first one would have to compute
            return
        token, drawn = _preparing.set(True), random.getstate()
        try:
            with self._checked(args, kwargs):
                self._traced(*args, **kwargs)
        except _Planned:
            pass
        finally:
            _preparing.reset(token)
            random.setstate(drawn)

    @contextlib.contextmanager
    def _checked(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """If that is wanted, what is traced meanwhile is compared with the model before it runs."""
        own: Any = getattr(self._function, "__func__", None)
        model = self._model
        is_models = own is not None and getattr(self._function, "__self__", None) is model
        if model is None or not is_models or not self.planning.options.verify or isinstance(model, FunctionModule):
            yield
            return

        def traced(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
            one_graph = not self.planning.options.graph_breaks
            return Traced(types.MethodType(own, twin), lambda graph: graph.module.forward, one_graph=one_graph)(
                *args, **kwargs
            )

        token = _check.set(functools.partial(check_same_graph, model, own, traced, (tuple(args), kwargs)))
        try:
            yield
        finally:
            _check.reset(token)

    def compiled(self) -> list[Compiled]:
        """What was planned so far."""
        return [entry.expected for graph in self._graphs for entry in graph.entries()]

    def _make(self, graph: TracedGraph) -> Callable[..., Any]:
        if self._model is not None:
            check_plannable(self._model)
        self.draws |= any("random_value" in source for source in graph.sources)
        planned = PlannedGraph(self.planning, graph, self._model)
        self._graphs.append(planned)
        return planned.run_weakly()


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
        if _preparing.get():
            raise _Planned
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
            check = _check.get()
            if check is not None:
                _check.set(None)
                check()
        return entry

    def _profile(
        self, key: _Key, inputs: Sequence[torch.Tensor], tangents: dict[int, tuple[int, ...]] | None = None
    ) -> Profile:
        joint = self._lifted.capture(inputs, tangents)
        parameters = [inputs[i] for i in self._parameter_places]
        unused_bytes = self._lifted.unused_bytes
        options = self._planning.options
        return profile_of(joint, options, parameters, gradients_allocated=key[0], unused_bytes=unused_bytes)

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
