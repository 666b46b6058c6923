"""From a model and the arguments of a call to a runnable plan: capture, profile, solve, rewrite, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxckpt.capture.joint import JointGraph, capture
from fxckpt.core.decisions import decisions
from fxckpt.core.graph import Graph, Storage
from fxckpt.core.plans import Plan
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import solve
from fxckpt.errors import BudgetError, OverBudgetWarning, PlanMismatchError
from fxckpt.options import Options, budget_in_bytes
from fxckpt.profile import measure
from fxckpt.profile.build import CostModel, OpCost, Profile, build, working_nodes
from fxckpt.profile.estimate import DEVICES, DeviceProfile, estimate_us
from fxckpt.rewrite.split import emit
from fxckpt.rewrite.verify import verify
from fxckpt.runtime.autograd import Program
from fxckpt.units import format_bytes


@dataclass(frozen=True)
class Compiled:
    """A planned step: what was captured, what was decided, and what runs."""

    profile: Profile
    plan: Plan
    program: Program


def profile_step(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    options: Options,
    *,
    forward: Callable[..., Any],
    gradients_allocated: bool,
    tangents: Mapping[int, tuple[int, ...]] | None = None,
) -> Profile:
    """Capture a step and attach bytes and times to it.

    Raises:
        CaptureError: the model can't be captured as one graph.
    """
    joint = capture(model, args, kwargs, forward=forward, tangents=tangents)
    return profile_of(joint, options, gradients_allocated=gradients_allocated)


def profile_of(joint: JointGraph, options: Options, *, gradients_allocated: bool, unused_bytes: int = 0) -> Profile:
    """Attach bytes and times to a captured step; `unused_bytes` are those of parameters that it does not read."""
    profile = build(joint, cost_model(options, joint))
    if unused_bytes:
        unused = Storage("unused parameters and buffers", unused_bytes, "parameter")
        profile = replace(profile, graph=replace(profile.graph, storages=(*profile.graph.storages, unused)))
    graph = replace(profile.graph, gradients_allocated=gradients_allocated, reserved_bytes=options.reserve_bytes)
    return replace(profile, graph=graph)


def cost_model(options: Options, joint: JointGraph) -> CostModel:
    """The cost model that a user named; workspaces are measured wherever ops may be run."""
    device = joint.device
    name = options.cost_model
    on_device = options.run_ops and device.type != "meta"
    if name == "auto":
        name = "measure" if on_device else "estimate"
    if name == "measure" and not on_device:
        raise BudgetError(
            'cost_model="measure" runs the ops, but the model is on the meta device: use cost_model="estimate"'
        )
    if options.cost_cache is not None and not on_device:
        raise BudgetError(
            "cost_cache keeps what was measured, but here no op is run: "
            'use cost_model="measure" on a real device, or leave it out'
        )
    estimate = estimated(DEVICES["reference"] if name == "reference" else _device_profile(device, options.device))
    if not on_device:
        return estimate
    nodes = working_nodes(joint)
    measure.measure_private(nodes)
    with measure.cost_file(options.cost_cache, nodes):
        measure.measure_workspaces(nodes)
        if name != "measure":
            return measure.with_workspaces(estimate)
        measure.measure_times(nodes, estimate)
        return measure.measured


def estimated(device: DeviceProfile) -> CostModel:
    """The cost model that runs nothing."""
    return lambda node: OpCost(estimate_us(node, device))


def _device_profile(device: torch.device, wanted: str | DeviceProfile | None) -> DeviceProfile:
    """The profile that a user named, else that of the model's device;

    A model on the meta device is planned for an A100.
    """
    if isinstance(wanted, DeviceProfile):
        return wanted
    if wanted is not None:
        if wanted not in DEVICES:
            raise BudgetError(
                f"there is no device {wanted!r}; choose one of {', '.join(DEVICES)}, or give a DeviceProfile"
            )
        return DEVICES[wanted]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((profile for key, profile in DEVICES.items() if key in name), DEVICES["A100"])
    return DEVICES["A100" if device.type == "meta" else "cpu"]


def make_plan(profile: Profile, options: Options, similar: Iterable[Plan] = ()) -> Plan:
    """Choose a schedule: the given plan's, that of a similar graph planned before if it fits, else a solver's.

    Raises:
        PlanMismatchError: the given plan is for another graph.
        InfeasibleBudgetError: the budget is below what the solver reaches.
        BudgetError: the budget makes no sense.
    """
    graph = profile.graph
    peak_bytes = simulate(graph, plain(graph)).peak_bytes
    budget_bytes = budget_in_bytes(options.budget, peak_bytes, profile.joint.device)
    if options.plan is not None:
        return _made_elsewhere(options.plan, graph, budget_bytes)
    for plan in similar:
        if plan.graph.structure == graph.structure:
            reused = replace(plan, graph=graph, budget_bytes=budget_bytes)
            if reused.predicted.peak_bytes <= budget_bytes:
                return reused
    solution = solve(graph, budget_bytes, options.solver, **options.solver_options)
    return Plan(graph, solution.schedule, solution.solver, _cost_name(options, profile), budget_bytes)


def _made_elsewhere(plan: Plan, graph: Graph, budget_bytes: int) -> Plan:
    """The plan with what is known here of its graph."""
    _check_same_graph(plan, graph)
    plan = replace(plan, graph=graph)
    peak_bytes = plan.predicted.peak_bytes
    if peak_bytes > budget_bytes:
        warnings.warn(
            f"the plan's peak is {format_bytes(peak_bytes)} here, over the budget of {format_bytes(budget_bytes)}: "
            "where it was made, less was known of what kernels allocate inside, or gradients were not there before "
            'the step. Plan here: with cost_model="measure", or by optimize with a budget alone',
            OverBudgetWarning,
            stacklevel=2,
        )
    return plan


def _cost_name(options: Options, profile: Profile) -> str:
    if options.cost_model != "auto":
        return options.cost_model
    return "measure" if options.run_ops and profile.joint.device.type != "meta" else "estimate"


def _check_same_graph(plan: Plan, graph: Graph) -> None:
    if plan.fingerprint != graph.fingerprint:
        raise PlanMismatchError(
            f"the plan is for graph {plan.fingerprint} ({len(plan.graph.ops)} ops), but this model and these inputs "
            f"give "
            f"graph {graph.fingerprint} ({len(graph.ops)} ops). Plan again for this model, these input shapes and "
            f"this torch"
        )


def make_program(profile: Profile, schedule: Schedule, hooked: frozenset[int] = frozenset()) -> Program:
    """Emit the graphs of a schedule, and check that they execute it; `hooked` as for `emit`."""
    emitted = emit(profile, schedule, hooked)
    verify(profile, schedule, emitted)
    return Program(profile.joint.roles, emitted)


def annotate(profile: Profile, plan: Plan) -> None:
    """Write what the plan decides for each op of the captured graph to its `node.meta["fxckpt"]`."""
    decided = decisions(plan)
    repeats = plan.schedule.repeats()
    for index, (node, op) in enumerate(zip(profile.nodes, plan.graph.ops, strict=True)):
        node.meta["fxckpt"] = {
            "runs": 1 + repeats.get(index, 0),
            "decisions": {plan.graph.storages[s].name: decided[s] for s in op.writes if s in decided},
        }
