"""Plans and runs a model's training steps: what is behind a stand-in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt.module.bypass import Bypasses
from fxckpt.module.methods import Methods
from fxckpt.module.planning import Planning
from fxckpt.module.route import Route
from fxckpt.module.unguarded import Unguarded
from fxckpt.options import Options
from fxckpt.pipeline import Compiled


class Planner:
    """Plans and runs a model's training steps.

    Attributes:
        plain: the user's own model.
        options: what the user asked for.
        planning: what was planned so far.
        bypasses: calls that ran without a plan.
        methods: the model's other methods.
        forward: what the stand-in's `forward` is.
    """

    def __init__(self, plain: nn.Module, options: Options) -> None:
        self.plain, self.options = plain, options
        self.planning, self.bypasses = Planning(options), Bypasses()
        self.methods = Methods(plain, self.planning, self.bypasses)
        self._unguarded = Unguarded(plain, self.planning, self.bypasses)
        self._route = Route(plain.forward, plain, self.planning, self.bypasses, self._unguarded)
        self.forward = self._own_forward = self._planned_forward()

    @property
    def latest(self) -> Compiled | None:
        """What was planned last."""
        return self.planning.latest

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, planned. Without grad it is the plain forward."""
        return self._route.call(args, kwargs)

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Capture and plan for these arguments now."""
        with torch.enable_grad():
            self._route.prepare(args, kwargs)

    def compiled(self) -> list[Compiled]:
        """What was planned so far."""
        return [*self._route.front.compiled(), *self.methods.compiled(), *self._unguarded.compiled()]

    def set_forward(self, forward: Callable[..., Any] | None) -> None:
        """Plan another function in forward's place; None for the model's own."""
        if forward is None or forward is self._own_forward:
            self.forward = self._own_forward
            return
        route = self.methods.route(forward, "forward was replaced by a function that can't be planned as a whole")
        self.forward = functools.partial(Route.called, route)
        functools.update_wrapper(self.forward, forward)

    def _planned_forward(self) -> Callable[..., Any]:
        """`call`, with the signature of the model's own forward."""
        forward = functools.partial(Planner.call, self)
        functools.update_wrapper(forward, self.plain.forward)
        return forward
