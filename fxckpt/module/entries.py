"""What is planned for a model so far: an entry for each input signature, found again at each call in microseconds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxckpt.capture.constants import only_value
from fxckpt.capture.structure import Structure, put_together
from fxckpt.capture.watch import Signature, Watch, watch
from fxckpt.core.pareto import Pareto
from fxckpt.core.plans import Plan
from fxckpt.core.schedule import Schedule
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.errors import InvalidScheduleError, RuntimeContractError
from fxckpt.module.ledger import Kin, ledger
from fxckpt.options import Options
from fxckpt.pipeline import Compiled, make_bridge
from fxckpt.profile.build import Profile
from fxckpt.runtime.autograd import Program, Tangents, run_forward
from fxckpt.upstream.ambient import Ambient

Values = tuple[int | None, ...]
"""For each argument whose values a model asks for, the value that all its elements have, if they have one."""


@dataclass(eq=False)
class Entry:
    """All that is known for one input signature: what to run now, and captures and backwards from other outputs.

    Attributes:
        owner: whose parameters it uses: the same object for all entries of a model.
        options: what was asked for.
        compile: makes a plan of a profile runnable.
        signature: of the calls that it serves.
        gradients_allocated: whether they find gradients to add to.
        expected: what the next call runs if it is alone in its step.
        ambient: the global state of the first call.
        captured: what was planned, by the tangents that backward starts from.
        bridges: backwards from other tangents than their forward was planned for.
        kin: shared with the entry of the same calls where gradients are accounted for in the other way.
    """

    owner: object
    options: Options
    compile: Callable[[Profile, Plan], Compiled]
    signature: Hashable
    gradients_allocated: bool
    expected: Compiled
    ambient: Ambient = field(default_factory=Ambient.now)
    captured: dict[Tangents, Compiled] = field(default_factory=dict)
    bridges: dict[tuple[int, Tangents], Program] = field(default_factory=dict)
    kin: Kin = field(default_factory=Kin)
    _timelines: dict[tuple[int, bool], tuple[Timeline, ...]] = field(default_factory=dict)
    _variants: dict[tuple[int, bool, Schedule], Compiled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.captured.setdefault(self.expected.program.tangents, self.expected)

    @property
    def fraction(self) -> float | None:
        """The budget, if it was given as a fraction of the plain step's peak."""
        return self.options.budget if isinstance(self.options.budget, float) else None

    def timelines(self, *, gradients_allocated: bool) -> tuple[Timeline, ...]:
        """The ways to run it, from lean to fast, where gradients are counted as allocated or as fresh."""
        profile = self.expected.profile
        key = id(profile), gradients_allocated
        if key not in self._timelines:
            graph, options = profile.graph.with_gradients(gradients_allocated), self.options
            if options.plan is not None and options.plan.fingerprint == graph.fingerprint:
                self._timelines[key] = (simulate(graph, options.plan.schedule),)
            else:
                self._timelines[key] = Pareto.of(graph, options.solver, **options.solver_arguments).timelines
        return self._timelines[key]

    def variant(self, timeline: Timeline) -> Compiled:
        """What runs it as simulated in one of `timelines`."""
        expected, graph = self.expected, timeline.graph
        key = id(expected.profile), graph.gradients_allocated, timeline.schedule
        if key not in self._variants:
            plan = Plan.of(
                timeline,
                solver=expected.plan.solver,
                cost_model=expected.plan.cost_model,
                budget_bytes=expected.plan.budget_bytes,
            )
            self._variants[key] = self.compile(replace(expected.profile, graph=graph), plan)
        return self._variants[key]

    def run(
        self,
        given: Callable[[Compiled], Sequence[torch.Tensor]],
        other_backward: Callable[[Compiled, Tangents], Program],
    ) -> Any:
        """The outputs of a call, by what its step has room for.

        Args:
            given: the tensors for the inputs of what runs.
            other_backward: what a backward from other outputs runs, behind what ran.
        """
        compiled, seat = ledger().take(self)
        try:
            results = run_forward(
                compiled.program, given(compiled), functools.partial(other_backward, compiled), seat.leave
            )
        except BaseException:
            seat.leave()
            raise
        return put_together(compiled.profile.joint.outputs, iter(results))

    def all_compiled(self) -> Iterator[Compiled]:
        """Everything that it may run."""
        yield from self.captured.values()
        yield from self._variants.values()

    def continued(self, ran: Compiled, present: Tangents, capture: Callable[[], Compiled]) -> Program:
        """A backward from the tangents `present` behind the forward that ran; the next forward is planned for them.

        Raises:
            RuntimeContractError: what that forward kept can't serve it.
        """
        if present not in self.captured:
            captured = capture()
            self.captured[present] = self.captured.setdefault(captured.program.tangents, captured)
        other = self.expected = self.captured[present]
        if other.program.tangents == ran.program.tangents:
            return ran.program
        key = (id(ran), present)
        if key not in self.bridges:
            try:
                self.bridges[key] = make_bridge(ran.program, other.profile)
            except InvalidScheduleError as error:
                raise RuntimeContractError(
                    f"backward started from other outputs than expected, and this forward can't serve it: {error}. "
                    "Run forward again: it is planned for them now"
                ) from error
        return self.bridges[key]


Key = tuple[tuple[Signature, Values], bool]
"""An input signature with the values that are asked for, and whether gradients are allocated."""


class Entries:
    """The entries of a model, None where there is nothing to plan. All are forgotten when parts of it are replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.watch: Watch = watch(model)
        self._entries: dict[Key, Entry | None] = {}
        self._asked: dict[Signature, tuple[int, ...]] = {}  # arguments whose values the model asks for

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry in self._entries.values() if entry is not None)

    def __getitem__(self, key: Key) -> Entry | None:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def refresh(self) -> None:
        """Begin anew if submodules, parameters or buffers of the model were added, removed or replaced."""
        if self.watch.changed():
            self.watch, self._entries, self._asked = watch(self._model), {}, {}

    def key(self, tensors: list[torch.Tensor], structure: Structure) -> Key:
        """Equal for calls which one entry serves."""
        form = self.watch.signature(tensors, structure)
        return (form, self._values(form, tensors)), self.watch.gradients_allocated()

    def add(self, key: Key, entry: Entry | None, tensors: list[torch.Tensor]) -> None:
        """An entry for the calls of a key; if its graph holds for values of arguments, these become part of the key."""
        (form, _), allocated = key
        if entry is not None:
            asked = entry.expected.profile.joint.asked
            self._asked[form] = tuple(sorted(asked.union(self._asked.get(form, ()))))
            key = (form, self._values(form, tensors)), allocated
            entry.signature = key[0]
        self._entries[key] = entry

    def twin(self, key: Key) -> Entry | None:
        """The entry of the same step, its gradients accounted for in the other way."""
        signature, allocated = key
        return self._entries.get((signature, not allocated))

    def serves(self, entry: Entry, tensors: list[torch.Tensor], structure: Structure) -> bool:
        """Whether an entry would serve these arguments as the model is now, whatever gradients are allocated."""
        return not self.watch.changed() and self.key(tensors, structure)[0] == entry.signature

    def _values(self, form: Signature, tensors: list[torch.Tensor]) -> Values:
        return tuple([only_value(tensors[number]) for number in self._asked.get(form, ())])
