"""One training step of a contender, measured: real peak, FLOPs, gradients; and several contenders timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.peers import Compiled, Forward
from fxckpt.memory import peak_allocated_bytes
from tests.models import Case

_WARM_UP = 3
_SEED = 7

aten = torch.ops.aten

_ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
"""What torch's own registry lacks."""


@dataclass(frozen=True)
class Contender:
    """A way to run the training step of a model.

    Attributes:
        model: the model whose gradients are computed.
        forward: what is called instead of the model.
        args, kwargs: with what.
        loss: from what is returned to what is differentiated.
    """

    model: nn.Module
    forward: Forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]

    @classmethod
    def of(cls, case: Case, apply: Callable[[nn.Module], Forward]) -> Contender:
        """A case's model, built anew, with `apply` applied."""
        model, args, kwargs = case.build()
        return cls(model, apply(model), args, kwargs, case.loss)

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Forward and backward, from the same seed each time; what the model returns is held to the end."""
        torch.manual_seed(_SEED)
        outputs = self.forward(*self.args, **self.kwargs)
        self.loss(outputs).backward()

    def warm_up(self) -> None:
        """Let it compile or plan."""
        for _ in range(_WARM_UP):
            self.clear()
            self.step()
        self.clear()


@dataclass(frozen=True)
class Figures:
    """What one step takes and gives.

    Attributes:
        allocated_bytes: most bytes in use above what is there before the step [B].
        flops: those of matrix products, convolutions and attention.
        gradients: the gradient of each parameter, None where there is none.
    """

    allocated_bytes: int
    flops: int
    gradients: tuple[Tensor | None, ...]


def measured(contender: Contender) -> Figures:
    """Measure a contender that is warm. The FLOPs come last: a dispatch mode must not be there in other runs."""
    contender.clear()
    contender.step()
    gradients = tuple(None if p.grad is None else p.grad.clone() for p in contender.model.parameters())
    contender.clear()
    peak_bytes = peak_allocated_bytes(contender.step, torch.device("cpu"))
    contender.clear()
    flops = _flops(contender)
    contender.clear()
    return Figures(peak_bytes, flops, gradients)


def _flops(contender: Contender) -> int:
    if isinstance(contender.forward, Compiled):
        return contender.forward.flops
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
        contender.step()
    return int(counter.get_total_flops())


def largest_difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """The largest absolute difference of any element; infinite where one has a gradient that the other lacks."""
    if any((a is None) != (b is None) for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None and a.numel()]
    return max(((a - b).abs().max().item() for a, b in pairs), default=0.0)


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of neighbouring runs."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"

    @classmethod
    def of(cls, times: Sequence[float], baseline: Sequence[float]) -> Ratio:
        """The ratios of runs that were made in the same round."""
        low, median, high = statistics.quantiles((a / b for a, b in zip(times, baseline, strict=True)), n=4)
        return cls(median, low, high)


def timed_in_turn(contenders: Sequence[Contender], runs: int) -> list[list[float]]:
    """For each contender the times of its steps [s]; in every round each runs once, and each round starts with another
    one.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(runs):
        for place in range(len(contenders)):
            index = (number + place) % len(contenders)
            contenders[index].clear()
            start = time.perf_counter()
            contenders[index].step()
            times[index].append(time.perf_counter() - start)
    return times
