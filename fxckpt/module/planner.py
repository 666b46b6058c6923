"""The module that stands in for the user's model: the same object in another class, with planned forward and backward.

The stand-in shares the model's whole `__dict__`, so parameters, buffers, submodules, flags and attributes are the same
in both, whichever of the two is changed. What fxckpt needs beside that lives in a slot, outside the dictionary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt.module.bypass import Bypasses
from fxckpt.module.front import Planning
from fxckpt.module.methods import Methods, watched_methods
from fxckpt.module.refused import check_plannable
from fxckpt.module.route import Route
from fxckpt.module.unguarded import Unguarded
from fxckpt.options import Options
from fxckpt.pipeline import Compiled
from fxckpt.upstream.hooks import call_module

_SLOT = "_fxckpt"


def stand_in(model: nn.Module, options: Options) -> nn.Module:
    """A module that stands in for `model` and is planned by `options`, at its first call or by `prepare`."""
    plain = plain_model(model)
    check_plannable(plain)
    plain_class: Any = type(plain)
    kind = _stand_in_class(plain_class)
    module = object.__new__(kind)
    object.__setattr__(module, "__dict__", plain.__dict__)
    object.__setattr__(module, _SLOT, Planner(plain, options))
    return module


def planner_of(model: nn.Module) -> Planner | None:
    """The planner behind a stand-in, or None for other modules."""
    return getattr(model, _SLOT, None) if isinstance(model, _StandIn) else None


def plain_model(model: nn.Module) -> nn.Module:
    """The user's own model behind a stand-in; other modules are returned as they are."""
    planner = planner_of(model)
    return model if planner is None else planner.plain


class _StandIn:
    """What a stand-in does differently from the model's class."""

    _fxckpt: Planner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_module(self, args, kwargs)  # whatever `nn.Module.compile` left on the model

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        planner = self._fxckpt
        return stand_in(copy.deepcopy(planner.plain, memo), planner.options)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return stand_in, (self._fxckpt.plain, self._fxckpt.options)


class _Forward:
    """`forward` of a stand-in: planned on the module, the model's own on the class (whose signature people inspect).

    Whoever sets it on the module, as accelerate does to add autocast, wraps the planned one.
    """

    def __init__(self, plain_forward: Callable[..., Any]) -> None:
        self._plain_forward = plain_forward

    def __get__(self, module: Any, _: Any = None) -> Callable[..., Any]:
        return self._plain_forward if module is None else module._fxckpt.forward

    def __set__(self, module: Any, forward: Callable[..., Any]) -> None:
        module._fxckpt.set_forward(forward)

    def __delete__(self, module: Any) -> None:
        module._fxckpt.set_forward(None)


@functools.cache
def _stand_in_class(kind: Any) -> type[nn.Module]:
    body = {
        "__slots__": (_SLOT,),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "forward": _Forward(kind.forward),
        **watched_methods(kind),
    }
    return type(kind.__name__, (_StandIn, kind), body)


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
