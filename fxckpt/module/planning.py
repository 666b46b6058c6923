"""How a function's graphs are planned, and what was planned so far: the same for all ways to capture them."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from fxckpt.capture.structure import take_apart
from fxckpt.core.outside import between_bytes, loss_bytes
from fxckpt.core.plans import Plan
from fxckpt.errors import OverBudgetWarning
from fxckpt.module.entries import Entry
from fxckpt.options import Options
from fxckpt.pipeline import Compiled, annotate, make_fitting, make_program
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, Tangents
from fxckpt.steps.equivalence import check_same_step
from fxckpt.units import format_bytes

_WORTH_A_WORD = 1 / 50
"""So much over the budget, against the budget, is told."""


class Owner(Protocol):
    """What has entries, by key."""

    def forget(self, key: Any) -> None:
        """Drop an entry; the next call that needs it makes it anew."""


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
        self._looked_outside = False
        self.kept: OrderedDict[int, tuple[weakref.ref[Owner], Any]] = OrderedDict()
        self.latest: Compiled | None = None
        self.plans: deque[Plan] = deque(maxlen=options.max_plans)
        self.lock = threading.RLock()

    def keep(self, graph: Owner, key: Any, entry: Entry) -> None:
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
        plan, program = make_fitting(profile, options, self.plans, hooked)
        if not options.graph_breaks:
            self._look_outside(plan)
        self.plans.append(plan)
        return self._compiled(profile, plan, program)

    def _look_outside(self, plan: Plan) -> None:
        """Warn once where a loss that is computed outside of the model may need more than the budget."""
        over_bytes = between_bytes(plan.timeline) - plan.budget_bytes
        if over_bytes > _WORTH_A_WORD * plan.budget_bytes and not self._looked_outside:
            self._looked_outside = True
            warnings.warn(
                "a loss that is computed outside of the model is not part of the plan. One such as cross entropy takes "
                f"up to {format_bytes(loss_bytes(plan.timeline))} between forward and backward; the step is then "
                f"up to {format_bytes(over_bytes)} over the budget of {format_bytes(plan.budget_bytes)}. Optimize the "
                "function that computes the loss instead of the model, or leave room by reserve=",
                OverBudgetWarning,
                stacklevel=2,
            )

    def runnable(self, profile: Profile, plan: Plan, hooked: frozenset[int]) -> Compiled:
        """A plan of a profiled step made runnable; `hooked` as for `compile`."""
        return self._compiled(profile, plan, make_program(profile, plan.timeline, hooked))

    def _compiled(self, profile: Profile, plan: Plan, program: Program) -> Compiled:
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
