"""What every measurement has: a device, the size of models, a folder; and models made to run there."""

from __future__ import annotations

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

        Room is left for what is beside the model. Measured costs are kept for later processes, if there is a folder.

        Raises:
            InfeasibleBudgetError: the budget is below the floor.
        """
        model, args, kwargs = built
        options = {"reserve": self.beside_bytes, **options}
        if self.folder is not None:
            options = {"cost_cache": self.folder / "costs.json", **options}
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            return fxckpt.optimize(model, budget, example_inputs=args, example_kwargs=kwargs, **options)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
