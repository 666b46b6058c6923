"""One example of the fuzzer: a program trained plain and optimized; all that both leave is compared.

Each trial trains some steps from the same seeds, then measures what a further one allocates. Eager torch refuses some
programs (an in-place change of what backward reads); fxckpt refuses some with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fxckpt
from benchmarks.models.training import assert_same_bits
from fxckpt.capture.roles import Result
from fxckpt.capture.structure import take_apart
from fxckpt.core.graph import Graph
from fxckpt.core.schedule import Schedule, plain
from fxckpt.core.simulate import simulate
from fxckpt.core.solvers import SOLVERS, lowest, solve
from fxckpt.errors import CaptureError, RuntimeContractError, UnguardedCaptureWarning
from fxckpt.module.stand_in import planner_of
from fxckpt.upstream.allocator import peak_allocated_bytes
from fxckpt.upstream.ops.layout import layout_of
from tests.fuzz.described import Described
from tests.fuzz.layers import Loss
from tests.fuzz.program import Program, programs
from tests.fuzz.state import Stateful

RANDOM = "random"
"""A solver that repeats ops anywhere, sensible or not."""

NAMES = (RANDOM, *(name for name, method in SOLVERS.items() if not method.exact and name != "collection"))
STEPS = 2
TOLERANCE, SLACK_BYTES = 0.01, 8192
"""How far the measured peak may be from the simulated one; `SLACK_BYTES` for states of generators and numbers."""

TRANSPOSING_BYTES = 60 * 60 * 8
"""A buffer of copies into another layout. Autograd makes one of an input's gradient where the layouts differ."""

REFUSALS = re.compile(
    "forward changes an input in place and gradients flow|Run forward again|has been modified by an inplace operation"
    "|draws random numbers from|by a random number of Python's|stores a tensor in attribute"
    "|uses a tensor that is neither"
)
"""Reasons for which fxckpt may refuse a program of the menu."""


ABOUT = "about the same: "
"""Of an input that is returned too the loss gives a part of the gradient: torch adds up the parts in another order."""


class Refused(Exception):  # noqa: N818 - not an error: the trial does not count
    """Eager torch does not run this program, or fxckpt says why it can't."""


@dataclass(frozen=True, repr=False)
class Trial(Described):
    """A program and how it is trained.

    Attributes:
        program: the model.
        solver: who plans, "random" for a schedule that repeats ops at random.
        budget: where between the solver's floor (0) and the plain peak (1) the budget is.
        allocated: whether gradients are there before the first step, and are added to by all.
        training: train or eval mode.
        backward: "together" from the sum of the losses, "one by one", or "twice" through the same graph.
        unused: how many of the outputs that require grad are left out of the loss, as long as one is in it.
        autocast: whether the model runs within autocast.
        hooks: whether hooks double the gradients of some parameters.
    """

    program: Program
    solver: str = "auto"
    budget: float = 0.0
    allocated: bool = False
    training: bool = True
    backward: str = "together"
    unused: int = 0
    autocast: bool = False
    hooks: bool = False

    def schedule(self, graph: Graph, _: int) -> Schedule:
        """The solver that the optimized model is given; it chooses the budget itself, knowing floor and plain peak."""
        if self.solver == RANDOM:
            return _repeating_at_random(graph)
        options = {"effort": "fast"} if self.solver in ("auto", "dp", "min_memory") else {}
        floor_bytes = lowest(graph, self.solver, **options).timeline.peak_bytes
        plain_bytes = simulate(graph, plain(graph)).peak_bytes
        budget_bytes = floor_bytes + int(self.budget * max(0, plain_bytes - floor_bytes))
        return solve(graph, budget_bytes, self.solver, **options).schedule


def _repeating_at_random(graph: Graph) -> Schedule:
    """The plain order with some ops repeated anywhere after their first run, and before backward ends.

    What forward hands out is counted as its first copy: there it is the only one.
    """
    order, forward_steps = list(plain(graph).order), graph.forward_count
    last, handed_out = order[-1], {*graph.outputs, *graph.updates}
    free = [i for i, op in enumerate(graph.ops) if not op.pinned and i != last]
    generator = random.Random(len(order))
    for index in generator.sample(free, len(free) // 2):
        first = forward_steps if handed_out.intersection(graph.ops[index].writes) else 0
        places = range(max(first, order.index(index) + 1), order.index(last) + 1)
        if not places:  # handed out, and there is no op in backward
            continue
        place = generator.choice(places)
        forward_steps += place < forward_steps
        order.insert(place, index)
    return Schedule(tuple(order), forward_steps)


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    """Any trial."""
    return Trial(
        draw(programs(least_stateful=draw(st.sampled_from((0, 0, 1, 2))))),
        draw(st.sampled_from(NAMES)),
        draw(st.sampled_from((0.0, 0.0, 0.25, 0.5, 0.75, 1.0))),
        draw(st.booleans()),
        draw(st.sampled_from((True, True, True, False))),
        draw(st.sampled_from(("together", "together", "together", "one by one", "twice"))),
        draw(st.sampled_from((0, 0, 1))),
        draw(st.sampled_from((False, False, False, True))),
        draw(st.sampled_from((False, False, False, True))),
    )


@contextlib.contextmanager
def described(trial: Trial) -> Iterator[None]:
    """A failure inside says how to run the trial again."""
    try:
        yield
    except Refused:
        raise
    except BaseException as error:
        error.add_note(f"To see it again: from tests.fuzz import *; check({trial!r})")
        raise


def check(trial: Trial) -> None:
    """Train the program plain and optimized.

    Raises:
        AssertionError: they leave something different, or the measured peak is not the simulated one.
        Refused: eager torch does not run it, or fxckpt says that it can't.
    """
    with described(trial), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, inputs = trial.program.build()
        twin, twin_inputs = copy.deepcopy(model), copy.deepcopy(inputs)
        _prepare(model.train(trial.training), inputs, trial)
        _prepare(twin.train(trial.training), twin_inputs, trial)
        optimized = fxckpt.optimize(model, "1TB", solver=trial.schedule, cost_model="reference")
        for seed in range(STEPS):
            expected = _plain_step(twin, twin_inputs, trial, seed)
            found = _optimized_step(optimized, inputs, trial, seed)
            try:
                _assert_same(found, expected)
            except AssertionError as error:
                if _states(model) and any(issubclass(w.category, UnguardedCaptureWarning) for w in said):
                    raise Refused("it was said that what forward reads from Python stays as it is") from error
                raise
        if trial.backward == "together" and not _states(model):
            _check_peak(optimized, inputs, trial)


def _prepare(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial) -> None:
    for leaf in (*model.parameters(), *inputs):
        if leaf.requires_grad and trial.allocated:
            leaf.grad = torch.zeros_like(leaf)
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and trial.hooks and number % 2 == 0:
            parameter.register_hook(_double)


def _double(gradient: Tensor) -> Tensor:
    return gradient * 2


Left = dict[str, Tensor | None]


def _plain_step(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial, seed: int) -> Left:
    try:
        return _step(model, inputs, trial, seed)
    except Exception as error:
        raise Refused(f"eager: {error}") from error


def _optimized_step(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial, seed: int) -> Left:
    try:
        return _step(model, inputs, trial, seed)
    except (CaptureError, RuntimeContractError) as error:
        if REFUSALS.search(str(error)):
            raise Refused(str(error)) from error
        raise


def _step(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial, seed: int) -> Left:
    """A step, and all that it leaves."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what people use
    for state in _states(model):
        state.change(seed)
    _clear(model, inputs, trial)
    outputs = _train(model, inputs, trial)
    left: Left = {f"output {i}": output for i, output in enumerate(outputs)}
    left |= {f"requires_grad of output {i}": torch.tensor(output.requires_grad) for i, output in enumerate(outputs)}
    left |= {f"layout of output {i}": torch.tensor(layout_of(output)) for i, output in enumerate(outputs)}
    left |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    returned = {output.untyped_storage()._cdata for output in outputs}
    also_outside = [x.requires_grad and x.untyped_storage()._cdata in returned for x in inputs]
    left |= {f"{ABOUT if also_outside[i] else ''}gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    left |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    left |= {f"input {i}": x for i, x in enumerate(inputs)}
    left["random-number state"] = torch.get_rng_state()
    left["random-number state of Python"] = torch.tensor(random.getstate()[1])
    left |= {f"{name} of state {i}": x for i, state in enumerate(_states(model)) for name, x in state.told().items()}
    return {name: None if x is None else x.detach().clone() for name, x in left.items()}


def _states(model: nn.Module) -> list[Stateful]:
    return [module for module in model.modules() if isinstance(module, Stateful)]


def _clear(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial) -> None:
    for leaf in (*model.parameters(), *inputs):
        if not trial.allocated:
            leaf.grad = None


def _train(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial) -> list[Tensor]:
    """Forward and backward; what was returned."""
    with torch.autocast("cpu", torch.bfloat16, enabled=trial.autocast):
        outputs: list[Tensor] = take_apart(model(*inputs))[0]
    ends = [output for output in outputs if output.requires_grad]
    _differentiate(ends[min(trial.unused, len(ends) - 1) :], trial)
    return outputs


def _differentiate(outputs: list[Tensor], trial: Trial) -> None:
    losses = [Loss.of(output) for output in outputs]
    if trial.backward == "one by one":
        for number, loss in enumerate(losses, 1):
            loss.backward(retain_graph=number < len(losses))
        return
    if trial.backward == "twice":
        torch.autograd.backward(losses, retain_graph=True)
    torch.autograd.backward(losses)


def _assert_same(found: Left, expected: Left) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), f"{name} is there in one of the two only"
        if name.startswith(ABOUT) and value is not None:
            largest = value.nan_to_num(0, 0, 0).abs().max().item() if value.numel() else 0.0
            rounding = 8 * torch.finfo(value.dtype).eps * largest
            torch.testing.assert_close(found[name], value, rtol=0, atol=rounding, equal_nan=True)
        else:
            assert_same_bits(found[name], value, name)


def _check_peak(model: nn.Module, inputs: tuple[Tensor, ...], trial: Trial) -> None:
    """What a step allocates is what the plan's simulation says, which is within the budget."""
    planner: Any = planner_of(model)
    if planner.latest is None or trial.hooks or not _loss_adds_nothing(planner.latest.profile.joint.roles.results):
        return
    if any(node.target is torch.ops.aten._conj.default for node in planner.latest.profile.joint.module.graph.nodes):
        return  # kernels copy what is conjugated, which shows where ops are measured only
    _clear(model, inputs, trial)
    measured_bytes = peak_allocated_bytes(lambda: _train(model, inputs, trial), torch.device("cpu"))
    plan = planner.latest.plan
    simulated_bytes = plan.predicted.peak_bytes - plan.graph.static_bytes
    slack_bytes = TOLERANCE * plan.predicted.peak_bytes + SLACK_BYTES
    slack_bytes += TRANSPOSING_BYTES * any(x.requires_grad for x in inputs)
    difference_bytes = measured_bytes - simulated_bytes
    assert abs(difference_bytes) <= slack_bytes, f"measured {measured_bytes} B, simulated {simulated_bytes} B"


def _loss_adds_nothing(results: Sequence[Result]) -> bool:
    """Whether no gradients are added up outside of the model: those of an input that is returned."""
    return not any(result.kind.endswith("input") for result in results)
