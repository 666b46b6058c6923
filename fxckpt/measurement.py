"""Measure a training step: real peak and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxckpt.capture.structure import take_apart
from fxckpt.errors import FxckptError
from fxckpt.memory import peak_allocated_bytes

_RUNS = 5


@dataclass(frozen=True)
class Measurement:
    """What a training step really takes.

    Attributes:
        peak_bytes: most bytes in use, those that are there before the step (`resident_bytes`) included [B].
        resident_bytes: parameters, buffers, gradients that are allocated already, and inputs [B].
        step_us: median time of forward and backward [µs].
        runs: how many steps were timed.
    """

    peak_bytes: int
    resident_bytes: int
    step_us: float
    runs: int


def measure_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, runs: int = _RUNS) -> Measurement:
    """Measure steps of a model on these arguments; see `fxckpt.measure`.

    Raises:
        FxckptError: the model is on the meta device, or returns nothing to differentiate.
    """
    tensors, _ = take_apart((args, kwargs))
    device = next((t.device for t in (*model.parameters(), *tensors)), torch.device("cpu"))
    if device.type == "meta":
        raise FxckptError("a model on the meta device can't be run: use fxckpt.plan for predicted figures")

    def step() -> None:
        _backward(model(*args, **kwargs))

    with _left_as_it_was(model), torch.enable_grad():
        with _gradients_put_back(model):
            step()  # the first call plans; the second may be planned for other outputs
        peaks, times = [], []
        for _ in range(2):
            with _gradients_put_back(model):
                peaks.append(peak_allocated_bytes(step, device))
        for _ in range(runs):
            with _gradients_put_back(model):
                start = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append((time.perf_counter() - start) * 1e6)
        resident = [*model.parameters(), *model.buffers(), *tensors]
        resident += [p.grad for p in model.parameters() if p.grad is not None]
        resident_bytes = _storage_bytes(resident)
    return Measurement(resident_bytes + peaks[-1], resident_bytes, statistics.median(times), runs)


def _backward(result: Any) -> None:
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.dim() == 0:
        loss.backward()
        return
    ends = [_Ones.apply(t) for t in take_apart(result)[0] if t.requires_grad]  # type: ignore[no-untyped-call]
    if not ends:
        raise FxckptError("the model returns nothing that requires grad, so there is no training step to measure")
    torch.autograd.backward(ends)


class _Ones(torch.autograd.Function):
    """A scalar whose gradient is a fresh tensor of ones, as a loss would give it: nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.form = (x.shape, x.dtype, x.device)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        shape, dtype, device = ctx.form
        return torch.ones(shape, dtype=dtype, device=device)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng(), _gradients_put_back(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)


@contextmanager
def _gradients_put_back(model: nn.Module) -> Iterator[None]:
    before = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient, old in before:
            parameter.grad = gradient
            if gradient is not None and old is not None:
                with torch.no_grad():
                    gradient.copy_(old)


def _storage_bytes(tensors: list[Any]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in pytree.tree_leaves(tensors)}
    return sum(storages.values())
