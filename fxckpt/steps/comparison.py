"""A training step run in two ways, side by side: peak, time, arithmetic, and whether the gradients are the same."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxckpt.errors import FxckptError, UnguardedCaptureWarning
from fxckpt.profile.estimate import ATTENTION_FLOPS
from fxckpt.steps.step import Measurement, TrainingStep, measurement_of, timed_in_turn
from fxckpt.units import format_bytes, format_us


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of ratios."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], baseline: Sequence[float]) -> Ratio:
        """The ratios of steps that ran in the same round (see `timed_in_turn`); at least two."""
        low, median, high = statistics.quantiles((a / b for a, b in zip(times, baseline, strict=True)), n=4)
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """A plain and an optimized step, measured.

    Attributes:
        plain, optimized: peak and time of each.
        time_ratio: time of the optimized step over that of the plain one.
        plain_flops, optimized_flops: arithmetic of matrix products, convolutions and attention that really ran.
        same_bits: whether all gradients are the same to the last bit.
        largest_gradient_difference: over all elements; 0 if the bits are the same.
    """

    plain: Measurement
    optimized: Measurement
    time_ratio: Ratio
    plain_flops: int
    optimized_flops: int
    same_bits: bool
    largest_gradient_difference: float

    @property
    def peak_ratio(self) -> float:
        """Peak of the optimized step over that of the plain one."""
        return self.optimized.peak_bytes / max(self.plain.peak_bytes, 1)

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the optimized step over those of the plain one; 1 if there are none."""
        return self.optimized_flops / self.plain_flops if self.plain_flops else 1.0

    def to_json(self) -> str:
        """The figures as JSON, with their units in the names; a difference that is no number is null."""
        figures = asdict(self) | {"peak_ratio": self.peak_ratio, "flops_ratio": self.flops_ratio}
        if not math.isfinite(self.largest_gradient_difference):
            figures["largest_gradient_difference"] = None
        return json.dumps({"fxckpt_comparison": 1, **figures}, indent=1, allow_nan=False)

    def __str__(self) -> str:
        from tabulate import tabulate  # here, so that measuring does without it

        plain, ours = self.plain, self.optimized
        rows = [
            ["peak memory", format_bytes(plain.peak_bytes), format_bytes(ours.peak_bytes), f"{self.peak_ratio:.3f}"],
            ["step time", format_us(plain.step_us), format_us(ours.step_us), str(self.time_ratio)],
            ["FLOPs", f"{self.plain_flops:.4g}", f"{self.optimized_flops:.4g}", f"{self.flops_ratio:.3f}"],
        ]
        table = tabulate(
            rows,
            ["one training step", "plain", "optimized", "ratio"],
            colalign=("left", "right", "right", "left"),
            disable_numparse=True,
        )
        same = "the same to the last bit" if self.same_bits else f"differ by {self.largest_gradient_difference:.3g}"
        return (
            f"{table}\n\nGradients: {same}. Times: medians of {plain.runs} steps run in turn; their ratio with "
            "quartiles."
        )


def compare(plain: TrainingStep, optimized: TrainingStep, *, runs: int) -> Comparison:
    """Measure two steps against each other; both leave no trace.

    Raises:
        FxckptError: a model can't be run, the two have different parameters, or there are fewer than two runs.
    """
    if runs < 2:
        raise FxckptError(f"a comparison needs at least two runs for its spread, not {runs}")
    steps = (plain, optimized)
    if [leaf.shape for leaf in plain.leaves] != [leaf.shape for leaf in optimized.leaves]:
        raise FxckptError("the two models have different parameters: their gradients can't be compared")
    for step in steps:
        _ = step.device  # refuses the meta device
        step.warm_up()
    gradients = [gradients_of(step) for step in steps]
    difference = largest_difference(*gradients)
    same_bits = all(_same_bits(a, b) for a, b in zip(*gradients, strict=True))
    times = timed_in_turn(steps, runs)
    plain_measured, ours_measured = (measurement_of(*pair) for pair in zip(steps, times, strict=True))
    flops = [flops_of(step) for step in steps]  # last: no other run may happen under a dispatch mode
    return Comparison(
        plain_measured, ours_measured, Ratio.of(times[1], times[0]), flops[0], flops[1], same_bits, difference
    )


def gradients_of(step: TrainingStep) -> list[Tensor | None]:
    """The gradients after one step: of parameters, and of inputs that require them."""
    with step.without_trace():
        step.run()
        return [None if leaf.grad is None else leaf.grad.clone() for leaf in step.leaves]


def flops_of(step: TrainingStep) -> int:
    """FLOPs of the matrix products, convolutions and attention that a step really runs."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with step.without_trace(), warnings.catch_warnings(), counter:
        warnings.simplefilter("ignore", UnguardedCaptureWarning)  # Dynamo can't trace under a mode that looks at ops
        step.run()
    return int(counter.get_total_flops())


class _NoModules:
    """Stands for what tells a counter in which module it is by hooks: on modules, and on outputs, whose gradients a
    plan would then be asked for."""

    parents = frozenset(("Global",))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def largest_difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """The largest absolute difference of any element; a missing gradient is infinitely different from one."""
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if _same_bits(a, b):
        return 0.0
    if a is None or b is None or a.shape != b.shape:
        return math.inf
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    difference = (a.to_dense().to(wide) - b.to_dense().to(wide)).abs().max().item()
    return math.inf if math.isnan(difference) else difference


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().to_dense().contiguous().reshape(-1).view(torch.uint8)
