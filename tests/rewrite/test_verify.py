"""Each refusal of the verifier, provoked: a step that was emitted as planned is damaged in one way."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from traceback import extract_tb
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import Timeline, simulate
from fxckpt.core.solvers.keep import closure
from fxckpt.errors import VerificationError
from fxckpt.options import Options
from fxckpt.pipeline import profile_step
from fxckpt.profile.build import Profile
from fxckpt.rewrite import verify as verifier
from fxckpt.rewrite.backends.python import PythonExecutable, executable
from fxckpt.rewrite.emitted import deliver
from fxckpt.rewrite.verify import verify

aten = torch.ops.aten
SOURCE = Path(verifier.__file__)


class Net(nn.Module):
    """ReLUs that may be written over or not, a difference, a power, views, and a buffer that is read and changed."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 64)
        self.register_buffer("seen", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.atan2(x, self.seen)
        self.seen.add_(1)
        hidden = torch.relu(self.lift(x))
        y: Tensor = self.second(torch.relu(hidden - torch.relu(self.first(hidden)))).pow(3)
        return y


@cache
def profile() -> Profile:
    model = Net()
    options = Options(2**62, cost_model="reference", run_ops=False)
    return profile_step(model, (torch.randn(64, 16),), {}, options, forward=model.forward, gradients_allocated=False)


def always_anew(graph: Graph) -> Schedule:
    """Forward keeps nothing: for each op of backward all that it reads is made anew."""
    steps = list(range(graph.forward_count))
    for index in range(graph.forward_count, len(graph.ops)):
        steps += (*closure(graph, graph.ops[index].reads, graph.outputs), index)
    return Schedule(tuple(steps), graph.forward_count)


@dataclass(frozen=True)
class Step:
    """An emitted step, and what it was emitted for."""

    profile: Profile
    timeline: Timeline
    executable: PythonExecutable

    @classmethod
    def emitted(cls, schedule_of: Callable[[Graph], Schedule]) -> Step:
        timeline = simulate(profile().graph, schedule_of(profile().graph))
        return cls(profile(), timeline, executable(profile(), timeline))

    @property
    def forward(self) -> fx.Graph:
        return self.executable.emitted.forward

    @property
    def backward(self) -> fx.Graph:
        return self.executable.emitted.backward

    def node(self, name: str) -> fx.Node:
        """A node of the backward graph, or of the forward graph if its name begins with "forward."."""
        graph = self.forward if name.startswith("forward.") else self.backward
        found: fx.Node
        (found,) = (node for node in graph.nodes if node.name == name.removeprefix("forward."))
        return found

    def verify(self) -> None:
        verify(self.profile, self.timeline, self.executable)


Damage = Callable[[Step], Step | None]


def left_out(name: str) -> Damage:
    def damage(step: Step) -> None:
        node = step.node(name)
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)

    return damage


def run_twice(name: str) -> Damage:
    def damage(step: Step) -> None:
        node = step.node(name)
        with node.graph.inserting_after(node):
            node.graph.node_copy(node, lambda n: n)

    return damage


def exchanged(first: str, second: str, *, steps_too: bool) -> Damage:
    """Two neighbouring ops change places; `steps_too`: and each says that it is the step which stands there."""

    def damage(step: Step) -> None:
        one, other = step.node(first), step.node(second)
        other.append(one)
        if steps_too:
            numbers = one.meta["fxckpt_step"], other.meta["fxckpt_step"]
            other.meta["fxckpt_step"], one.meta["fxckpt_step"] = numbers

    return damage


def for_another(name: str, captured: str) -> Damage:
    """An op says that it stands for another captured one."""

    def damage(step: Step) -> None:
        (node,) = (n for n in step.profile.joint.module.graph.nodes if n.name == captured)
        step.node(name).meta["fxckpt_node"] = node

    return damage


def calling(name: str, target: Callable[..., object], **kwargs: str) -> Damage:
    """A node calls something else, with names of nodes as keyword arguments."""

    def damage(step: Step) -> None:
        node = step.node(name)
        node.target, node.kwargs = target, {key: step.node(value) for key, value in kwargs.items()}

    return damage


def with_constant(name: str, position: int, value: object) -> Damage:
    def damage(step: Step) -> None:
        node = step.node(name)
        assert not isinstance(node.args[position], fx.Node)
        node.update_arg(position, value)  # type: ignore[arg-type]

    return damage


def reading(name: str, instead_of: str, other: str) -> Damage:
    """A node reads another value."""

    def damage(step: Step) -> None:
        node, old = step.node(name), step.node(instead_of)
        assert old in node.all_input_nodes
        node.replace_input_with(old, step.node(other))

    return damage


def operands_exchanged(name: str) -> Damage:
    def damage(step: Step) -> None:
        node = step.node(name)
        first, second, *rest = node.args
        node.args = (second, first, *rest)

    return damage


def mentioned_at_the_end(name: str) -> Damage:
    """Something that is no op of the step holds a value until the end."""

    def damage(step: Step) -> None:
        node = step.node(name)
        (end,) = node.graph.find_nodes(op="output")
        with node.graph.inserting_before(end):
            node.graph.call_function(aten.detach.default, (node,))

    return damage


def saved(name: str) -> Damage:
    """Forward hands over one value more, which backward does not read."""

    def damage(step: Step) -> Step:
        node, first = step.node(name), next(iter(step.backward.nodes))
        with step.backward.inserting_before(first):
            placeholder = step.backward.placeholder(f"{node.name}_saved")
        placeholder.meta["fxckpt_node"] = node.meta["fxckpt_node"]
        emitted = step.executable.emitted
        emitted = replace(emitted, saved=(node, *emitted.saved))
        return replace(step, executable=replace(step.executable, emitted=emitted))

    return damage


def handing_over(change: Callable[[tuple[fx.Node, ...]], tuple[fx.Node, ...]]) -> Damage:
    """What forward hands over is not what backward takes."""

    def damage(step: Step) -> Step:
        emitted = step.executable.emitted
        emitted = replace(emitted, saved=change(emitted.saved))
        return replace(step, executable=replace(step.executable, emitted=emitted))

    return damage


def other_timeline(schedule_of: Callable[[Graph], Schedule]) -> Damage:
    """The step was emitted for another schedule."""

    def damage(step: Step) -> Step:
        return replace(step, timeline=simulate(step.profile.graph, schedule_of(step.profile.graph)))

    return damage


def worked_beside(name: str, *, captured: bool) -> Damage:
    """Something is computed that is no step; `captured`: it says of what captured op it is the value."""

    def damage(step: Step) -> None:
        node = step.node(name)
        with node.graph.inserting_after(node):
            copy = node.graph.node_copy(node, lambda n: n)
        copy.meta = {"fxckpt_node": node.meta["fxckpt_node"]} if captured else {}

    return damage


def returning(change: Callable[[tuple[fx.Node, ...]], tuple[fx.Node, ...]]) -> Damage:
    """Forward returns something else."""

    def damage(step: Step) -> None:
        (end,) = step.forward.find_nodes(op="output")
        returned: Any = end.args[0]
        end.args = (change(returned),)

    return damage


def delivering(change: Callable[[tuple[fx.Node, ...]], tuple[fx.Node | None, ...]], *, again: bool = False) -> Damage:
    """The last stage hands over something else, or does so twice."""

    def damage(step: Step) -> None:
        node = [n for n in step.backward.nodes if n.target is deliver][-1]
        gradients: Any = node.args
        node.args = change(gradients)
        if again:
            with step.backward.inserting_after(node):
                step.backward.node_copy(node, lambda n: n)

    return damage


def replaying(name: str, what: str) -> Damage:
    """A repeat reads what was kept for another."""

    def damage(step: Step) -> None:
        (kept,) = (node for node in step.node(name).all_input_nodes if "fxckpt_replay" in node.meta)
        kept.meta["fxckpt_replay"] = what

    return damage


def with_arguments(name: str, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Damage:
    def damage(step: Step) -> None:
        node = step.node(name)
        node.args = change(node.args)

    return damage


@dataclass(frozen=True)
class Case:
    """A damage, and what the verifier says of it; the step keeps everything, or else nothing."""

    damage: Damage
    message: str
    keeps: bool = True


NOT_THE_STEPS = "the emitted ops are not the steps of the schedule, in their order"
CASES: dict[str, Case] = {
    "an op is left out": Case(left_out("neg"), NOT_THE_STEPS),
    "a repeat is left out": Case(left_out("relu_2_again"), NOT_THE_STEPS, keeps=False),
    "an op runs twice": Case(run_twice("forward.pow_1"), NOT_THE_STEPS),
    "two ops change places": Case(exchanged("sum_1", "mm", steps_too=False), NOT_THE_STEPS),
    "it was emitted for another schedule": Case(other_timeline(always_anew), NOT_THE_STEPS),
    "two steps change places": Case(exchanged("mm", "mm_1", steps_too=True), "mm_1 is emitted where mm belongs"),
    "an op stands for another": Case(for_another("mm", "mm_1"), "mm is emitted where mm belongs"),
    "an op calls another": Case(
        calling("forward.relu", aten.sigmoid.default),
        r"relu calls aten\.sigmoid\.default, but relu calls .*relu\.default",
    ),
    "a view calls another": Case(calling("t_4", aten.detach.default), r"t_4 calls .*, but t_4 calls aten\.t\.default"),
    "an op in place is that of another": Case(
        calling("threshold_backward", aten.mul.out, out="mm"), r"threshold_backward calls aten\.mul\.Tensor, but .*"
    ),
    "another number": Case(with_constant("pow_2", 1, 4.0), r"pow_2 has the argument 4\.0 where pow_2 has 2\.0"),
    "another shape": Case(with_constant("view", 1, [4, 16]), "view has the argument .* where view has 64"),
    "another value is read": Case(
        reading("neg", "threshold_backward", "mul_1"), "neg reads mul_1 where a value of threshold_backward belongs"
    ),
    "another input is read": Case(
        reading("forward.addmm", "forward.primals_2", "forward.primals_4"),
        "addmm reads primals_4 where a value of primals_2 belongs",
    ),
    "another saved value is read": Case(
        reading("threshold_backward_1", "relu_1", "relu"), "threshold_backward_1 reads relu where .* relu_1 belongs"
    ),
    "operands change places": Case(operands_exchanged("forward.sub"), "sub reads relu_1 where a value of relu belongs"),
    "an old copy is read": Case(
        reading("mm_1", "relu_2_again_1", "relu_2_again"), "mm_1 reads an old copy of relu_2", keeps=False
    ),
    "an old copy is read by a repeat": Case(
        reading("relu_1_again_1", "addmm_1_again_1", "addmm_1_again"),
        "relu_1_again_1 reads an old copy of addmm_1",
        keeps=False,
    ),
    "a value lives too long": Case(
        mentioned_at_the_end("mul_1"), r"mul_1, written in step \d+, dies in step \d+ of the emitted code, but .*"
    ),
    "a repeated value lives too long": Case(
        mentioned_at_the_end("addmm_2_again"), r"addmm_2, written in step \d+, dies in step \d+ .*", keeps=False
    ),
    "a value is saved that the plan drops": Case(
        saved("forward.relu_2"), r"relu_2, written in step \d+, dies in step \d+ .*", keeps=False
    ),
    "a value that backward needs is not saved": Case(
        handing_over(lambda saved: saved[:-1]), r"atan2, written in step 0, dies in step 2 of the emitted code, but .*"
    ),
    "saved values change places": Case(
        handing_over(lambda saved: saved[::-1]),
        r"atan2, written in step 0, dies in step \d+ of the emitted code, but .*",
    ),
    "a value that backward needs is written over": Case(
        calling("forward.sub", aten.sub.out, out="forward.relu"), "sub writes over relu, which is still needed"
    ),
    "a value that a later op needs is written over": Case(
        calling("threshold_backward_1", aten.threshold_backward.grad_input, grad_input="threshold_backward"),
        "threshold_backward_1 writes over threshold_backward, which is still needed",
    ),
    "what forward saved is written over": Case(
        calling("threshold_backward", aten.threshold_backward.grad_input, grad_input="relu_2"),
        "threshold_backward writes over relu_2, which is still needed",
    ),
    "a tangent is written over": Case(
        calling("mul_1", aten.mul.out, out="tangents_1"), "mul_1 writes over tangents_1, which is still needed"
    ),
    "an op is computed beside the steps": Case(
        worked_beside("sum_1", captured=True), r"sum_\d computes sum_1 beside the steps of the schedule"
    ),
    "something unknown is computed": Case(
        worked_beside("sum_1", captured=False), r"sum_\d is neither a step nor made of the captured graph"
    ),
    "forward returns too little": Case(
        returning(lambda values: values[:-1]), r"forward returns None where \w+ belongs"
    ),
    "forward returns values in another order": Case(
        returning(lambda values: values[::-1]), r"forward returns \w+ where add belongs"
    ),
    "something else is delivered": Case(
        delivering(lambda gradients: (gradients[0].all_input_nodes[0], *gradients[1:])),
        r"\w+ is delivered where the gradient \w+ belongs",
    ),
    "a gradient is not delivered": Case(
        delivering(lambda gradients: (None, *gradients[1:])), r"None is delivered where the gradient \w+ belongs"
    ),
    "gradients are delivered twice": Case(
        delivering(lambda gradients: gradients, again=True), r"backward delivers gradients (\d+) times, in \d+ stages"
    ),
    "an argument is missing": Case(
        with_arguments("sum_1", lambda args: args[:-1]), "sum_1 has the argument None where sum_1 has True"
    ),
    "the old value of something else is read": Case(
        replaying("atan2_again", "sub.something"),
        r"atan2_again reads \w+ where the old value of \w+ belongs",
        keeps=False,
    ),
    "a number stands for a value": Case(
        with_arguments("mm", lambda args: (args[0], 3)), r"mm has the argument 3 where mm has \w+"
    ),
    "a parameter is written over": Case(
        calling("mul_1", aten.mul.out, out="primals_5"),
        "mul_1 writes over a value that is given, which is still needed",
    ),
}


def damaged(case: Case) -> VerificationError:
    step = Step.emitted(plain if case.keeps else always_anew)
    step = case.damage(step) or step
    with pytest.raises(VerificationError) as caught:
        step.verify()
    return caught.value


@pytest.mark.parametrize("schedule_of", [plain, always_anew])
def test_a_step_that_is_as_planned_passes(schedule_of: Callable[[Graph], Schedule]) -> None:
    Step.emitted(schedule_of).verify()


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused(name: str) -> None:
    case = CASES[name]
    assert re.fullmatch(case.message, str(damaged(case)))


def test_every_refusal_is_provoked() -> None:
    """A new refusal needs a damage that provokes it."""
    raised = {(extract_tb(damaged(case).__traceback__)[-1].lineno or 0) for case in CASES.values()}
    refusals = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
    ]
    assert len(refusals) >= 8
    assert [lines.start for lines in refusals if raised.isdisjoint(lines)] == []
    assert all(any(line in lines for lines in refusals) for line in raised)
