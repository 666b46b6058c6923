"""Emit a schedule as two fx graphs, forward and backward, in which repeated ops are there to read.

Gradients leave the backward graph in stages, as they are produced.
"""

from __future__ import annotations

from dataclasses import replace

from fxckpt.core import schedule as schedules
from fxckpt.core.schedule import Schedule
from fxckpt.profile.build import Profile
from fxckpt.rewrite.emitted import Emitted, Stage
from fxckpt.rewrite.writer import Writer
from fxckpt.upstream.ops.expect import EXPECT


def stages_of(profile: Profile, schedule: Schedule, hooked: frozenset[int] = frozenset()) -> tuple[Stage, ...]:
    """The stages of backward: which inputs' gradients leave after which step.

    The last stage has the inputs without a gradient too: a backward from other outputs may give them one. Gradients of
    the inputs `hooked` wait until backward does not read these inputs any more, since a hook may change them.
    """
    owners: dict[int, list[int]] = {}
    for index, given in enumerate(profile.joint.roles.inputs):
        if given.gradient is not None:
            owners.setdefault(profile.map.behind[given.gradient], []).append(index)
    stages = [
        Stage(delivery.step, tuple(index for storage in delivery.gradients for index in owners.get(storage, ())))
        for delivery in schedules.deliveries(profile.graph, schedule)
    ]
    if not stages:  # backward has no ops: it hands tangents through
        stages = [Stage(len(schedule) - 1, tuple(index for group in owners.values() for index in group))]
    inputs = profile.joint.roles.inputs
    rest = tuple(i for i, given in enumerate(inputs) if given.requires_grad and given.gradient is None)
    stages[-1] = replace(stages[-1], inputs=stages[-1].inputs + rest)
    for index in sorted(hooked):
        stages = _delayed(stages, index, _last_read(profile, schedule, index))
    return tuple(stages)


def _last_read(profile: Profile, schedule: Schedule, index: int) -> int:
    storage = profile.map.behind[profile.joint.roles.inputs[index].node]
    ops = profile.graph.ops
    return max((step for step, op in enumerate(schedule.order) if storage in ops[op].reads), default=-1)


def _delayed(stages: list[Stage], index: int, after: int) -> list[Stage]:
    """The stages with the gradient of input `index` leaving no earlier than after step `after`."""
    if stages[-1].step < after:
        stages = [*stages[:-1], replace(stages[-1], step=after)]
    old = next(n for n, stage in enumerate(stages) if index in stage.inputs)
    new = next(n for n, stage in enumerate(stages) if n >= old and stage.step >= after)
    moved = list(stages)
    moved[old] = replace(moved[old], inputs=tuple(i for i in moved[old].inputs if i != index))
    moved[new] = replace(moved[new], inputs=(*moved[new].inputs, index))
    return moved


def emit(profile: Profile, schedule: Schedule, hooked: frozenset[int] = frozenset()) -> Emitted:
    """Emit the forward and backward graphs of a schedule; `hooked` are inputs that hooks may change during backward."""
    schedules.check(profile.graph, schedule)
    stages = stages_of(profile, schedule, hooked)
    first = Writer(profile, schedule, None)
    for given in profile.joint.roles.inputs:
        first.place(given.node, first.graph.placeholder(given.node.name))
    for step in range(schedule.forward_steps):
        first.step(step)
    results = first.results()
    second = Writer(profile, schedule, first)
    second.place_tangents()
    finished = {stage.step: stage for stage in stages}
    if schedule.forward_steps == len(schedule):
        second.deliver(stages[-1].inputs)
    for step in range(schedule.forward_steps, len(schedule)):
        second.step(step)
        if step in finished:
            second.deliver(finished[step].inputs)
    first.finish(results, second.saved)
    given_indices = second.order_inputs([second.inputs[node] for node in second.saved])
    return Emitted(
        forward=first.graph,
        backward=second.graph,
        saved=tuple(second.saved),
        given=given_indices,
        tangents=second.tangents,
        stages=stages,
        read_outputs=second.read_outputs(),
        checks_values=any(node.target is EXPECT for node in first.graph.nodes),
    )
