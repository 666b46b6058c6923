"""Layers of the menu that read Python, change it, or draw from it: what a graph of tensors knows nothing of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Compute = Callable[[Any, Tensor], Tensor]
Change = Callable[[Any, int], object]

GLOBALS = {"scale": 1.0}


class Stateful(nn.Module):
    """Computes something of its input and of its own attributes.

    Attributes:
        number, flag, text, function, items, config, held: what it may read, and what others change between steps.
        calls, seen, last: what it may leave.
    """

    mean: Tensor

    def __init__(self, compute: Compute, change: Change = lambda _, __: None) -> None:
        super().__init__()
        self.compute, self._change = compute, change
        self.number, self.flag, self.text = 1.0, True, "sin"
        self.function: Callable[[Tensor], Tensor] = torch.tanh
        self.items = [1.0]
        self.config: dict[str, Any] = {"scale": 1.0, "inner": {"shift": 0}}
        self.held = {"x": torch.ones(())}
        self.calls = 0
        self.seen: list[Any] = []
        self.last: Tensor | None = None
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)

    def change(self, step: int) -> None:
        """What the user does between steps."""
        self._change(self, step)

    def told(self) -> dict[str, Tensor]:
        """All that may have changed, as tensors."""
        numbers = [self.calls, len(self.seen), len(self.items), *(x for x in self.seen if not isinstance(x, Tensor))]
        told = {"numbers": torch.tensor(numbers, dtype=torch.float64), "mean": self.mean, "held": self.held["x"]}
        told |= {f"seen {i}": x for i, x in enumerate(self.seen) if isinstance(x, Tensor)}
        return told if self.last is None else told | {"last": self.last}


def _counted(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    y: Tensor = x * (1 + m.calls % 3)
    return y


def _collected(m: Any, x: Tensor) -> Tensor:
    m.seen.append(x.detach().mean())
    return x.sin()


def _noted(m: Any, x: Tensor) -> Tensor:
    m.seen.append(len(m.seen) + x.shape[0])
    return x.cos()


def _remembered(m: Any, x: Tensor) -> Tensor:
    y: Tensor = x if m.last is None else x + m.last.mean().to(x.dtype)
    m.last = x.detach().clone()
    return y * 1.5


def _averaged(m: Any, x: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.detach().mean()
    y: Tensor = x - m.mean.to(x.dtype)
    return y


def _filled(m: Any, x: Tensor) -> Tensor:
    y: Tensor = x * m.held["x"].to(x.dtype)
    m.held["x"] = x.detach().mean().tanh()
    return y


def _drawn(_: Any, x: Tensor) -> Tensor:
    return x * random.random()


def _skipped(_: Any, x: Tensor) -> Tensor:
    return x if random.random() < 0.5 else x.sin()


def _of_numpy(_: Any, x: Tensor) -> Tensor:
    return x * float(np.random.rand())  # noqa: NPY002 - what people use


def _chosen(_: Any, x: Tensor) -> Tensor:
    return x * random.choice((0.5, 2.0))


STATE: dict[str, tuple[Compute, Change]] = {
    "reads a number": (lambda m, x: x * m.number, lambda m, i: setattr(m, "number", 1 / (i + 2))),
    "reads an exponent": (lambda m, x: x.abs() ** m.number, lambda m, i: setattr(m, "number", 1.0 + i)),
    "reads a flag": (lambda m, x: x.sin() + (x.detach() if m.flag else x), lambda m, i: setattr(m, "flag", i % 2 == 1)),
    "reads a text": (
        lambda m, x: getattr(torch, m.text)(x),
        lambda m, i: setattr(m, "text", ("sin", "cos")[i % 2]),
    ),
    "reads a list": (
        lambda m, x: sum((x * f for f in m.items), start=x),
        lambda m, i: m.items.append(float(i)),
    ),
    "reads a configuration": (
        lambda m, x: x * m.config["scale"] + m.config["inner"]["shift"],
        lambda m, i: m.config["inner"].update(shift=i),
    ),
    "reads a function": (
        lambda m, x: m.function(x),
        lambda m, i: setattr(m, "function", (torch.sigmoid, torch.tanh)[i % 2]),
    ),
    "reads a tensor in a dictionary": (
        lambda m, x: x * m.held["x"].to(x.dtype),
        lambda m, i: m.held.update(x=torch.full((), 1.0 + i)),
    ),
    "reads a global": (lambda _, x: x * GLOBALS["scale"], lambda _, i: GLOBALS.update(scale=1.0 + i)),
    "counts": (_counted, lambda _, __: None),
    "collects values": (_collected, lambda _, __: None),
    "collects numbers": (_noted, lambda _, __: None),
    "remembers its input": (_remembered, lambda _, __: None),
    "averages into a buffer": (_averaged, lambda _, __: None),
    "fills a dictionary": (_filled, lambda _, __: None),
    "draws a number": (_drawn, lambda _, __: None),
    "draws a decision": (_skipped, lambda _, __: None),
    "draws from numpy": (_of_numpy, lambda _, __: None),
    "draws a choice": (_chosen, lambda _, __: None),
}
"""What the layers compute, and what changes between steps."""
