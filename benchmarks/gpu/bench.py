"""What every measurement has: a device, the size of models, a folder; and models made to run there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxckpt
from benchmarks.models.cases import Case
from fxckpt.steps.step import TrainingStep

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Autocast(nn.Module):
    """A model under bf16 autocast, or as it is."""

    def __init__(self, model: nn.Module, device: str, *, enabled: bool) -> None:
        super().__init__()
        self.model, self.device, self.enabled = model, device, enabled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return self.model(*args, **kwargs)

    def autocast(self) -> torch.autocast:
        """The context in which it runs."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.enabled)


@dataclass(frozen=True)
class Bench:
    """Where a measurement runs.

    Attributes:
        device: "cuda" or "cpu".
        tiny: whether models are small ones, to try the benchmark itself.
        folder: for what measurements leave to later ones; None: nothing is left.
    """

    device: str = "cuda"
    tiny: bool = False
    folder: Path | None = None

    @property
    def beside_bytes(self) -> int:
        """For what is in a step beside the model: the loss and its gradient, a block each [B]."""
        return 1024 if self.device == "cuda" else 64

    def build(self, case: Case) -> Built:
        """A case's model and inputs, on the device."""
        return case.build(self.device)

    def step(
        self, built: Built, case: Case, *, autocast: bool, apply: Callable[[nn.Module], Any] | None = None
    ) -> TrainingStep:
        """The step of a built model, with a way to save memory applied to it; gradients are those of the model."""
        model, args, kwargs = built
        forward = model if apply is None else apply(model)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
                return forward(*args, **kwargs)

        return TrainingStep(model, args, kwargs, forward=run, loss=case.loss)

    def optimized(self, built: Built, budget: int | float, *, autocast: bool, **options: Any) -> nn.Module:
        """The built model planned in a budget for its inputs, under autocast or not.

        Room is left for what is beside the model. Times of tiny models' ops are estimated, since that is quick.

        Raises:
            InfeasibleBudgetError: the budget is below the floor.
        """
        model, args, kwargs = built
        options = {"reserve": self.beside_bytes, "cost_model": "estimate" if self.tiny else "auto", **options}
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            return fxckpt.optimize(model, budget, example_inputs=args, example_kwargs=kwargs, **options)

    def held_bytes(self) -> int:
        """Bytes that the process has allocated on the GPU [B]."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def peak_bytes(self, step: TrainingStep, before_bytes: int) -> int:
        """The most bytes in use during a step that is warm [B].

        Args:
            step: the step.
            before_bytes: what was held on the GPU before its model was built: whatever it keeps from one step to the
                next counts, too.
        """
        if self.device != "cuda":
            return step.resident_bytes() + step.allocated_bytes()
        gc.collect()
        self.synchronize()
        rest_bytes = self.held_bytes()
        with step.without_trace():
            torch.cuda.reset_peak_memory_stats()
            copies_bytes = self.held_bytes() - rest_bytes  # made to leave no trace
            step.run()
            self.synchronize()
            return torch.cuda.max_memory_allocated() - copies_bytes - before_bytes

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
