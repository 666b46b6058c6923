"""The model's other methods, and what is set in forward's place: planned where that is asked for, never past a plan
without a word."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxckpt.module.bypass import Bypasses, reaches
from fxckpt.module.front import Front, Planning
from fxckpt.module.route import Route
from fxckpt.pipeline import Compiled

_FRAMEWORKS = ("torch.", "lightning.", "pytorch_lightning.", "accelerate.")
"""Whose methods compute nothing of a model by themselves."""


class Methods:
    """Calls of a stand-in that are not calls of its forward."""

    def __init__(self, plain: nn.Module, planning: Planning, bypasses: Bypasses) -> None:
        self._plain, self._planning, self._bypasses = plain, planning, bypasses
        self._routes: dict[str, Route] = {}
        self._fronts: list[weakref.ref[Front]] = []

    def compiled(self) -> list[Compiled]:
        """What was planned for them so far."""
        fronts = [front for reference in self._fronts if (front := reference()) is not None]
        return [compiled for front in fronts for compiled in front.compiled()]

    def call(self, name: str, function: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A method's result; planned if the user named the method."""
        if name in self._planning.options.methods:
            if name not in self._routes:
                bound = types.MethodType(function, self._plain)
                self._routes[name] = self.route(bound, f"method {name!r} can't be planned")
            return self._routes[name].call(args, kwargs)
        if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return function(module, *args, **kwargs)
        remedy = f"method {name!r} was called, which is not planned (optimize(model, methods=({name!r},)) plans it)"
        return self._watched(functools.partial(function, module), remedy, args, kwargs)

    def route(self, function: Callable[..., Any], failure: str) -> Route:
        """The way through a plan for calls of a function; `failure` says that there is none."""

        def otherwise(error: Exception, args: Any, kwargs: Any) -> Any:
            return self._watched(function, f"{failure}: {error}", args, kwargs)

        route = Route(function, self._plain, self._planning, self._bypasses, otherwise)
        self._fronts.append(weakref.ref(route.front))
        return route

    def _watched(self, function: Callable[..., Any], reason: str, args: Any, kwargs: Any) -> Any:
        before = self._bypasses.count
        result = function(*args, **kwargs)
        if self._bypasses.count == before and reaches(result, self._plain.parameters()):
            self._bypasses.say(reason, stacklevel=4)
        return result


def watched_methods(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """For the body of a stand-in's class: the public methods of the model's own classes, each by way of `Methods`."""
    found: dict[str, Callable[..., Any]] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, nn.Module) or owner.__module__.startswith(_FRAMEWORKS) or owner is nn.Module:
            continue
        for name, function in vars(owner).items():
            if isinstance(function, types.FunctionType) and not name.startswith("_") and name != "forward":
                if name not in vars(nn.Module):
                    found[name] = _watched_method(name, function)
    return found


def _watched_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._fxckpt.methods.call(name, function, self, args, kwargs)

    return call
