"""From a model and the arguments of a call to a runnable plan: capture, profile, solve, rewrite, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxckpt.capture.joint import JointGraph, capture
from fxckpt.capture.roles import Arrival, InputKind
from fxckpt.capture.structure import take_apart
from fxckpt.core.caching_allocator import AllocatorSettings
from fxckpt.core.decisions import decisions
from fxckpt.core.fitting import solve_in_blocks
from fxckpt.core.graph import Graph, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.replay import Blocks, Occupancy, replay
from fxckpt.core.schedule import plain
from fxckpt.core.shares import Offer
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.core.solvers import solve
from fxckpt.errors import BudgetError, InfeasibleBudgetError, OverBudgetWarning, PlanMismatchError
from fxckpt.options import Budget, Options
from fxckpt.profile.build import Profile, build
from fxckpt.profile.costs import cost_model, name_on
from fxckpt.profile.device_memory import allocator_settings, block_bytes, give_back_free_blocks, library_bytes
from fxckpt.profile.fused import fuse, overwriting
from fxckpt.profile.optimizer_state import optimizer_state_bytes
from fxckpt.profile.storage import map_storages
from fxckpt.rewrite.backends import python
from fxckpt.rewrite.bridge import bridge
from fxckpt.rewrite.verify import verify
from fxckpt.runtime.autograd import Program, Tangents
from fxckpt.units import format_bytes, within
from fxckpt.upstream.tensors import device_of


@dataclass(frozen=True)
class Compiled:
    """A planned step: what was captured, what was decided, and what runs."""

    profile: Profile
    plan: Plan
    program: Program

    @cached_property
    def held_bytes(self) -> int:
        """What it adds to the memory in use from the end of its forward to the start of its backward [B]."""
        return Offer.of(self.plan.timeline).held_bytes

    def numbered(self, present: Tangents) -> dict[int, Arrival]:
        """The tangents `present` as `capture` takes them: by the number of the output among those with one."""
        outputs = self.profile.joint.roles.outputs
        arrivals = {outputs[index].tangent_number: arrival for index, arrival in present}
        return {number: arrival for number, arrival in arrivals.items() if number is not None}


def profile_step(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    options: Options,
    *,
    forward: Callable[..., Any],
    gradients_allocated: bool,
    tangents: Mapping[int, Arrival] | None = None,
    capability: tuple[int, int] | None = None,
) -> Profile:
    """Capture a step and attach bytes and times to it; `capability` as for `capture`.

    Raises:
        CaptureError: the model can't be captured as one graph.
    """
    arguments, _ = take_apart((tuple(args), kwargs))
    lowered = options.fuses(device_of((*model.parameters(), *arguments)))
    joint = capture(model, args, kwargs, forward=forward, tangents=tangents, capability=capability, lowered=lowered)
    given = {i.node: arguments[i.index] for i in joint.roles.inputs if i.kind is InputKind.ARGUMENT}
    return profile_of(joint, options, model.parameters(), gradients_allocated=gradients_allocated, given=given)


def profile_of(
    joint: JointGraph,
    options: Options,
    parameters: Iterable[torch.Tensor],
    *,
    gradients_allocated: bool,
    unused_bytes: int = 0,
    given: Mapping[fx.Node, torch.Tensor] | None = None,
) -> Profile:
    """Attach bytes and times to a captured step.

    Args:
        joint: the captured step.
        options: what was asked for.
        parameters: what an optimizer that is known by name steps.
        gradients_allocated: whether there are gradients to add to.
        unused_bytes: those of parameters and buffers that it does not read [B].
        given: what its inputs are, as far as they are known.
    """
    blocks_bytes = block_bytes(joint.device, options.device)
    fused = fuse(joint, map_storages(joint, blocks_bytes)) if joint.lowered else None
    costs = cost_model(
        joint,
        options.cost_model,
        device=options.device,
        cost_cache=options.cost_cache,
        run_ops=options.run_ops,
        given=given,
        fused=fused,
    )
    give_back_free_blocks(joint.device)
    profile = build(joint, costs, blocks_bytes, fused)
    if fused is not None:
        profile = overwriting(profile)
    if unused_bytes:
        unused = Storage("unused parameters and buffers", unused_bytes, "parameter")
        profile = replace(profile, graph=replace(profile.graph, storages=(*profile.graph.storages, unused)))
    reserved_bytes = options.reserve_bytes
    if options.optimizer is not None:
        reserved_bytes += optimizer_state_bytes(options.optimizer, parameters)
    graph = replace(
        profile.graph,
        gradients_allocated=gradients_allocated,
        reserved_bytes=reserved_bytes,
        library_bytes=library_bytes(profile.nodes, joint.device, options.device),
    )
    return replace(profile, graph=graph)


def make_plan(profile: Profile, options: Options, before: Sequence[Plan] = ()) -> Plan:
    """Choose a schedule: the given plan's, that of a similar graph planned before if it fits, else a solver's.

    A budget that is a fraction refers to the largest step that was planned before with the same options: a smaller one,
    such as that of an epoch's last batch, may take as many bytes.

    Raises:
        PlanMismatchError: the given plan is for another graph.
        InfeasibleBudgetError: the budget is below what the solver reaches.
        BudgetError: the budget makes no sense.
    """
    graph, device = profile.graph, profile.joint.device
    baseline = simulate(graph, plain(graph))
    occupancy = _occupancies(profile, options)
    taken = occupancy(baseline, eager=True) if occupancy else None
    plain_bytes = taken.allocated_bytes if taken else baseline.peak_bytes
    budget_bytes = budget_in_bytes(options.budget, plain_bytes, device, graph.library_bytes)
    if isinstance(options.budget, float):
        budget_bytes = max(budget_bytes, *(plan.budget_bytes for plan in before), 0)
    if options.plan is not None:
        plan = _made_elsewhere(options.plan, graph)
        plan = _with_blocks(plan, taken, occupancy)
        _warn_if_over(plan, budget_bytes)
        return plan
    for plan in before:
        if plan.graph.structure == graph.structure:
            reused = _with_blocks(replace(plan, graph=graph, budget_bytes=budget_bytes), taken, occupancy)
            if reused.peak_bytes <= budget_bytes:
                return reused
    blocks = None
    if occupancy is None or taken is None:
        solution = solve(graph, budget_bytes, options.solver, **options.solver_arguments)
    else:
        expected_bytes = plain_bytes - baseline.peak_bytes if plain_bytes > budget_bytes else 0
        solution, ours = solve_in_blocks(
            graph, budget_bytes, options.solver, occupancy, expected_bytes=expected_bytes, **options.solver_arguments
        )
        blocks = Blocks(ours, taken)
    return Plan.of(
        solution.timeline,
        solver=solution.solver,
        cost_model=name_on(device, options.cost_model, run_ops=options.run_ops),
        budget_bytes=budget_bytes,
        baseline=baseline,
        blocks=blocks,
    )


class _Occupancies:
    """What schedules of a step take of a device with a caching allocator."""

    def __init__(self, profile: Profile, settings: AllocatorSettings) -> None:
        self._profile, self._settings = profile, settings

    def __call__(self, timeline: Timeline, *, eager: bool = False) -> Occupancy:
        """What a schedule takes as emitted graphs run it, or in eager torch."""
        return replay(timeline, self._settings, {} if eager else python.written_over(self._profile, timeline))


def _occupancies(profile: Profile, options: Options) -> _Occupancies | None:
    settings = allocator_settings(profile.joint.device, options.device)
    return None if settings is None else _Occupancies(profile, settings)


def _with_blocks(plan: Plan, taken: Occupancy | None, occupancy: _Occupancies | None) -> Plan:
    """The plan with what it and the plain step take in blocks."""
    blocks = Blocks(occupancy(plan.timeline), taken) if occupancy and taken else None
    return replace(plan, blocks=blocks)


def budget_in_bytes(budget: Budget, peak_bytes: int, device: torch.device, kept_bytes: int = 0) -> int:
    """The bound on the peak that a user's budget means where the plain model's peak is `peak_bytes` [B].

    `kept_bytes` of it are what libraries keep.

    Raises:
        BudgetError: it is not a size, not positive, a fraction outside (0, 1], or None on a device without memory of
            its own.
    """
    return free_bytes(device) if budget is None else within(budget, peak_bytes, kept_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory that a CUDA device has for this process: what is free, and what torch holds already [B].

    Raises:
        BudgetError: the device is not a CUDA device.
    """
    if device.type != "cuda":
        raise BudgetError(
            f"memory_budget=None means the free memory of the CUDA device, but the model is on {device.type}: give a "
            'size such as memory_budget="8GB", or a fraction of the plain peak such as 0.5'
        )
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _made_elsewhere(plan: Plan, graph: Graph) -> Plan:
    """The plan with what is known here of its graph."""
    if plan.fingerprint != graph.fingerprint:
        raise PlanMismatchError(
            f"the plan is for graph {plan.fingerprint} ({len(plan.graph.ops)} ops), but this model and these inputs "
            f"give graph {graph.fingerprint} ({len(graph.ops)} ops). Plan again for this model, these input shapes and "
            "this torch"
        )
    return replace(plan, graph=graph)


def _warn_if_over(plan: Plan, budget_bytes: int) -> None:
    peak_bytes = plan.peak_bytes
    if peak_bytes > budget_bytes:
        warnings.warn(
            f"the plan's peak is {format_bytes(peak_bytes)} here, over the budget of {format_bytes(budget_bytes)}: "
            "where it was made, less was known of what kernels allocate inside, or gradients were not there before "
            'the step. Plan here: with cost_model="measure", or by optimize with a budget alone',
            OverBudgetWarning,
            stacklevel=2,
        )


def make_program(profile: Profile, timeline: Timeline, hooked: frozenset[int] = frozenset()) -> Program:
    """Emit the graphs of a simulated schedule, and check that what runs is that schedule; `hooked` as for `emit`."""
    executable = _backend(profile).executable(profile, timeline, hooked)
    verify(profile, timeline, executable)
    return Program(profile.joint.roles, executable)


_ATTEMPTS = 4
"""So often a step is planned anew if the code that runs takes more than its plan."""


def make_fitting(
    profile: Profile, options: Options, before: Sequence[Plan], hooked: frozenset[int] = frozenset()
) -> tuple[Plan, Program]:
    """A plan and what runs it; if that takes more than the budget by its own code, one for as much less is made.

    Args and errors as for `make_plan` and `make_program`. Where no plan fits, the one whose code takes least is taken,
    and an `OverBudgetWarning` says how much that is.
    """
    plan = make_plan(profile, options, before)
    found = [(plan, make_program(profile, plan.timeline, hooked))]
    for _ in range(_ATTEMPTS):
        plan, program = found[-1]
        over_bytes = (program.executable.peak_bytes or 0) - plan.budget_bytes
        if over_bytes <= 0:
            return plan, program
        if options.plan is not None:
            break
        try:
            smaller = make_plan(profile, replace(options, budget=plan.peak_bytes - over_bytes), ())
        except InfeasibleBudgetError:
            break
        smaller = replace(smaller, budget_bytes=plan.budget_bytes)
        found.append((smaller, make_program(profile, smaller.timeline, hooked)))
    plan, program = min(found, key=lambda made: made[1].executable.peak_bytes or 0)
    _warn_if_code_is_over(plan, program.executable.peak_bytes or 0)
    return plan, program


def _warn_if_code_is_over(plan: Plan, peak_bytes: int) -> None:
    if peak_bytes > plan.budget_bytes:
        warnings.warn(
            f"compiled, the step takes {format_bytes(peak_bytes)}, over the budget of "
            f"{format_bytes(plan.budget_bytes)}: kernels that were fused keep more in memory than the plan has. Leave "
            'room by reserve=, or use backend="python", whose peak is the plan\'s',
            OverBudgetWarning,
            stacklevel=2,
        )


def _backend(profile: Profile) -> Any:
    """What runs plans of a step."""
    if not profile.joint.lowered:
        return python
    from fxckpt.rewrite.backends import inductor  # which takes a second to import

    return inductor


def make_bridge(ran: Program, other: Profile) -> Program:
    """A backward from the outputs of another capture of a step, behind the forward that `ran` runs; see `bridge`.

    Raises:
        InvalidScheduleError: something that it needs was not kept, and can't be made again.
        RuntimeContractError: the two captures don't have the same forward.
    """
    emitted = bridge(ran.emitted, other)
    return Program(other.joint.roles, _backend(other).continuing(ran.executable, emitted, other))


def annotate(profile: Profile, plan: Plan) -> None:
    """Write what the plan decides for each op of the captured graph to its `node.meta["fxckpt"]`."""
    decided = decisions(plan.timeline, plan.baseline_timeline)
    repeats = plan.schedule.repeats()
    for index, (part, op) in enumerate(zip(profile.parts, plan.graph.ops, strict=True)):
        for node in part:
            node.meta["fxckpt"] = {
                "runs": 1 + repeats.get(index, 0),
                "decisions": {plan.graph.storages[s].name: decided[s] for s in op.writes if s in decided},
            }
