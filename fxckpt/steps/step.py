"""Measure training steps: real peaks, and times, of several ways to run a step in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fxckpt.capture.structure import take_apart
from fxckpt.errors import FxckptError
from fxckpt.upstream.allocator import Allocations, allocations
from fxckpt.upstream.blas import blas_workspace_bytes
from fxckpt.upstream.generators import draws_undone
from fxckpt.upstream.tensors import device_of, memory_bytes

_RUNS = 5


@dataclass(frozen=True)
class Measurement:
    """What a training step really takes.

    Attributes:
        peak_bytes: most bytes in use, those that are there before the step (`resident_bytes`) included [B].
        resident_bytes: parameters, buffers, gradients that are allocated already, inputs, and what cuBLAS keeps if the
            step runs it, as a plan counts them [B].
        step_us: median time of forward and backward [µs].
        runs: how many steps were timed.
    """

    peak_bytes: int
    resident_bytes: int
    step_us: float
    runs: int


@dataclass(frozen=True)
class TrainingStep:
    """Forward and backward of a model on given arguments, to be run as often as wanted.

    Attributes:
        model: the model whose gradients are computed.
        args, kwargs: what it is called with.
        forward: what is called instead of the model, if it isn't the model itself.
        loss: from what is returned to the scalar that is differentiated. None: the model's own `loss` if it returns
            one, else ones for the gradient of every output that requires grad.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Callable[..., Any] | None = None
    loss: Callable[[Any], Tensor] | None = None

    def run(self) -> None:
        """Forward and backward.

        Raises:
            FxckptError: the model returns nothing to differentiate.
        """
        outputs = (self.forward or self.model)(*self.args, **self.kwargs)
        if self.loss is None:
            _backward(outputs)
        else:
            self.loss(outputs).backward()

    @cached_property
    def device(self) -> torch.device:
        """Where it runs.

        Raises:
            FxckptError: the model is on the meta device.
        """
        device = device_of((*self.model.parameters(), *self._inputs))
        if device.type == "meta":
            raise FxckptError("a model on the meta device can't be run: use fxckpt.plan for predicted figures")
        return device

    @cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets gradients: parameters, and inputs that require them."""
        inputs = (t for t in self._inputs if t.requires_grad and t.is_leaf)
        return (*(p for p in self.model.parameters() if p.requires_grad), *inputs)

    @cached_property
    def _inputs(self) -> tuple[Tensor, ...]:
        return tuple(take_apart((self.args, self.kwargs))[0])

    @property
    def _held(self) -> tuple[Tensor, ...]:
        """What is there before the step, gradients aside."""
        return (*self.model.parameters(), *self.model.buffers(), *self._inputs)

    def resident_bytes(self) -> int:
        """Bytes of what is there before the step: parameters, buffers, inputs, gradients held already [B]."""
        gradients = (leaf.grad for leaf in self.leaves)
        return memory_bytes((*self._held, *(g for g in gradients if g is not None)))

    def allocations(self) -> Allocations:
        """What a step allocates beside what is there before it."""
        with self.without_trace():
            return allocations(self.run, self.device)

    def allocated_bytes(self) -> int:
        """The most bytes in use during a step above those before it [B]."""
        return self.allocations().peak_bytes

    def library_bytes(self, ops: Iterable[str]) -> int:
        """What libraries keep for good that a step of these ops calls, once they have been called [B]."""
        if self.device.type != "cuda":
            return 0
        with torch.cuda.device(self.device):
            return blas_workspace_bytes(ops, threads=2)

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Gradients, buffers and the state of random numbers are afterwards what they were."""
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        gradients = [(leaf, leaf.grad) for leaf in self.leaves]
        values = [None if gradient is None else gradient.clone() for _, gradient in gradients]
        try:
            with draws_undone(x.device for x in self._held), torch.enable_grad():
                yield
        finally:
            with torch.no_grad():
                for buffer, old in buffers:
                    buffer.copy_(old)
                for (leaf, gradient), value in zip(gradients, values, strict=True):
                    leaf.grad = gradient
                    if gradient is not None and value is not None:
                        gradient.copy_(value)

    def warm_up(self) -> None:
        """Run a step twice: the first plans, the second may be planned for other outputs."""
        for _ in range(2):
            with self.without_trace():
                self.run()

    def timed_us(self) -> float:
        """Time of one step [µs]."""
        with self.without_trace():
            self._wait()
            start = time.perf_counter()
            self.run()
            self._wait()
            return (time.perf_counter() - start) * 1e6

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def timed_in_turn(steps: Sequence[TrainingStep], runs: int) -> list[list[float]]:
    """For each step its times [µs]; in every round each runs once, and each round starts with another one."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(runs):
        for place in range(len(steps)):
            index = (number + place) % len(steps)
            times[index].append(steps[index].timed_us())
    return times


def measure_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, runs: int = _RUNS) -> Measurement:
    """Measure steps of a model on these arguments; see `fxckpt.measure`.

    Raises:
        FxckptError: the model is on the meta device, or returns nothing to differentiate.
    """
    step = TrainingStep(model, args, kwargs)
    _ = step.device  # refuses the meta device
    step.warm_up()
    return measurement_of(step, timed_in_turn([step], runs)[0])


def measurement_of(step: TrainingStep, times_us: Sequence[float]) -> Measurement:
    """Peak of a step that is warm, with times taken of it [µs]."""
    found = step.allocations()
    resident_bytes = step.resident_bytes() + step.library_bytes(found.ops)
    peak_bytes = resident_bytes + found.peak_bytes
    return Measurement(peak_bytes, resident_bytes, statistics.median(times_us), len(times_us))


def _backward(result: Any) -> None:
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0:
        loss.backward()
        return
    ends = [_Ones.apply(t) for t in take_apart(result)[0] if t.requires_grad]  # type: ignore[no-untyped-call]
    if not ends:
        raise FxckptError("the model returns nothing that requires grad, so there is no training step to measure")
    torch.autograd.backward(ends)


class _Ones(torch.autograd.Function):
    """A scalar whose gradient is a fresh tensor of ones, as a loss would give it: nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.form = (x.shape, x.dtype, x.device)
        return torch.zeros(
            (), dtype=torch.float32
        )  # on the CPU: on a GPU it would take a block, as would the gradient of it

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        shape, dtype, device = ctx.form
        return torch.ones(shape, dtype=dtype, device=device)
