"""Verification on request: a step of the plain model and one of the optimized model, compared bit by bit.

Both run on copies of model and inputs, so that gradients, buffers, inputs and the random-number generator stay as they
were. It takes the memory of the plain step and of two copies of the parameters.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt.capture.nodes import is_random
from fxckpt.capture.roles import Roles
from fxckpt.capture.structure import Structure, put_together, take_apart
from fxckpt.capture.watch import watch
from fxckpt.core.schedule import plain
from fxckpt.core.simulate import simulate
from fxckpt.errors import VerificationError
from fxckpt.pipeline import Compiled, make_program
from fxckpt.runtime.autograd import BackwardFor, Program, run_forward
from fxckpt.steps.diagnosis import first_difference
from fxckpt.upstream.generators import draws_undone, random_states
from fxckpt.upstream.ops.expect import UnexpectedValue
from fxckpt.upstream.tensors import copies

Forward = Callable[[nn.Module, list[torch.Tensor]], list[torch.Tensor]]
"""Runs a copy of the model on copies of the tensors among its arguments; returns the tensors among its results."""

Function = Callable[..., Any]
"""Given a model and arguments, computes what the model does."""

Ends = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Which of the outputs backward starts from."""

Left = dict[str, torch.Tensor | None]
"""What a step leaves: outputs, gradients, buffers, inputs and random-number state, by name."""


def check_same_step(
    model: nn.Module,
    compiled: Compiled,
    structure: Structure,
    tensors: Sequence[torch.Tensor],
    backward_for: BackwardFor,
) -> None:
    """Run a step of `model` and one of its `compiled` form on the arguments given by structure and tensors.

    Backward starts from the outputs that the plan expects, at random tangents.

    Raises:
        VerificationError: something that they leave differs. The message names it, and the first op that differs.
    """
    if compiled.profile.joint.device.type == "meta":
        raise VerificationError("verify=True runs the model, but it is on the meta device: move it to a real one")
    ends = functools.partial(_expected, compiled.program.roles)
    plain_step = functools.partial(_step, model, tensors, functools.partial(_called, structure, _forward), ends)

    def optimized_step(program: Program) -> Left:
        return _step(model, tensors, functools.partial(_optimized_forward, program, backward_for), ends)

    if compiled.profile.joint.lowered:
        _check_compiled(compiled, plain_step, optimized_step)
        return
    expected = plain_step()
    difference = _difference(optimized_step(compiled.program), expected)
    if not difference:
        return
    _check_deterministic(plain_step, expected)
    raise VerificationError(
        f"the optimized step differs from the plain step: {difference}. "
        f"{first_difference(compiled, plain_step, optimized_step)}"
    )


def _check_compiled(
    compiled: Compiled, plain_step: Callable[[], Left], optimized_step: Callable[[Program], Left]
) -> None:
    """Compare what is compiled with the same step compiled without a plan, and with eager where nothing is drawn.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    graph = compiled.profile.graph
    without = make_program(compiled.profile, simulate(graph, plain(graph)))
    found = optimized_step(compiled.program)
    references = {"compiled without a plan": optimized_step(without)}
    if not any(map(is_random, compiled.profile.joint.module.graph.nodes)):
        references["run by eager torch"] = plain_step()
    for name, expected in references.items():
        difference = _difference(found, expected, rounded=True)
        if difference:
            raise VerificationError(
                f"the optimized step differs from the step {name}, by more than rounding: {difference}"
            )


def check_same_graph(model: nn.Module, forward: Function, traced: Function, given: tuple[Any, ...]) -> None:
    """Run a step of `model` by its forward and one by what was traced of it.

    Backward starts from all outputs that require grad.

    Args:
        model: what was traced.
        forward: calls a copy of the model, given positional and keyword arguments.
        traced: does the same by graphs that were traced of it.
        given: the arguments, positional and keyword ones.

    Raises:
        VerificationError: something that they leave differs.
    """
    tensors, structure = take_apart(given)
    plain_step = functools.partial(_step, model, tensors, functools.partial(_called, structure, forward), _all)
    expected = plain_step()
    difference = _difference(_step(model, tensors, functools.partial(_called, structure, traced), _all), expected)
    if not difference:
        return
    _check_deterministic(plain_step, expected)
    raise VerificationError(
        f"the graph that TorchDynamo traced computes something else than the model: {difference}. It is not the plan's "
        "doing: put the model into a bug report"
    )


def _check_deterministic(plain_step: Callable[[], Left], expected: Left) -> None:
    if _difference(plain_step(), expected):
        raise VerificationError(
            "the plain model gives other results when it runs a second time from the same random-number state, so "
            "there is nothing to compare with. Make it deterministic (see torch.use_deterministic_algorithms)"
        )


def _forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model.forward(*args, **kwargs)


def _called(
    structure: Structure, function: Function, twin: nn.Module, tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    args, kwargs = put_together(structure, iter(tensors))
    return take_apart(function(twin, *args, **kwargs))[0]


def _optimized_forward(
    program: Program, backward_for: BackwardFor, twin: nn.Module, tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    return run_forward(program, watch(twin).given(program.roles.inputs, tensors), backward_for)


def _step(model: nn.Module, tensors: Sequence[torch.Tensor], forward: Forward, ends: Ends) -> Left:
    """What a step of a copy of the model leaves, from the present random-number state, which is put back.

    Backward runs in this thread, which holds locks that what it calls may need.
    """
    here = torch.autograd.set_multithreading_enabled(False)
    devices = {x.device for x in (*model.parameters(), *model.buffers(), *tensors)}
    with draws_undone(devices), _random_forked(), torch.enable_grad(), here:
        twin, given = _copy(model), copies(tensors)
        try:
            outputs = forward(twin, given)
        except UnexpectedValue as error:
            what = str(error).splitlines()[0]  # who interprets a graph adds where it was
            raise VerificationError(f"{what}, so that the plain forward would run. Give inputs that pass it") from error
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            differentiated = ends(outputs)
            torch.autograd.backward(differentiated, [_tangent(end) for end in differentiated])
        left: Left = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        left |= {f"requires_grad of output {i}": torch.tensor(o.requires_grad) for i, o in enumerate(outputs)}
        left |= {f"gradient of {name}": p.grad for name, p in twin.named_parameters()}
        left |= {f"gradient of input {i}": x.grad for i, x in enumerate(given) if x.is_leaf}
        left |= {f"buffer {name}": buffer.detach() for name, buffer in twin.named_buffers()}
        left |= {f"input {i}": x.detach() for i, x in enumerate(given)}
        left |= {f"random-number state of {name}": state for name, state in random_states(devices).items()}
        return left


@contextlib.contextmanager
def _random_forked() -> Iterator[None]:
    """Python's own random numbers are put back, too."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _expected(roles: Roles, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the plan expects to be differentiated: computed outputs that have a tangent, and views of them."""
    expected = {i for i, output in enumerate(roles.outputs) if output.tangent is not None}
    return [
        output
        for output, result in zip(outputs, roles.results, strict=True)
        if result.kind.endswith("output") and result.index in expected and output.requires_grad
    ]


def _all(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [output for output in outputs if output.requires_grad]


def _tangent(output: torch.Tensor) -> torch.Tensor:
    """One for a loss; else random numbers in the output's layout, the same each time."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(output.numel())
    values = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
    return torch.empty_like(output).copy_(values)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise VerificationError(f"verify=True runs copies of the model, but copy.deepcopy fails: {error}") from error


_ROUNDING: dict[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-3}
"""What counts as rounding in the norm of a tensor, against its norm; for types of fewer bits a twentieth."""


def _difference(found: Left, expected: Left, *, rounded: bool = False) -> str:
    """The first thing that differs and by how much, or "" if nothing does, or by rounding alone where that is asked."""
    norms = [x.double().norm().item() for x in expected.values() if x is not None and x.is_floating_point()]
    least = max(norms, default=0.0) / 1000  # what is nearly zero has no digits to compare
    for name, theirs in expected.items():
        ours = found.get(name)
        if theirs is None and ours is None:
            continue
        if theirs is None or ours is None:
            return f"{name} is {'missing' if ours is None else 'there, but the plain model has none'}"
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"{name} is {ours.dtype}{list(ours.shape)} instead of {theirs.dtype}{list(theirs.shape)}"
        if rounded and theirs.is_floating_point():
            error = (ours.double() - theirs.double()).norm().item()
            if not error <= _ROUNDING.get(theirs.dtype, 0.05) * max(theirs.double().norm().item(), least):
                return f"{name}, by {error:.3g} in its norm of {theirs.double().norm().item():.3g}"
            continue
        same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
        if not same.all():
            worst = (ours[~same].to(torch.complex128) - theirs[~same].to(torch.complex128)).abs().max().item()
            return f"{name} ({(~same).sum()} of {same.numel()} elements, by up to {worst:.3g})"
    return ""
