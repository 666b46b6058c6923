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
from fxckpt.module.front import Front
from fxckpt.module.planning import Planning
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
        return _AsItIs(functools.partial(function, module), remedy, self._plain, self._bypasses).call(
            None, args, kwargs
        )

    def route(self, function: Callable[..., Any], failure: str) -> Route:
        """The way through a plan for calls of a function; `failure` says that there is none."""

        otherwise = _AsItIs(function, failure, self._plain, self._bypasses)
        route = Route(function, self._plain, self._planning, self._bypasses, otherwise)
        self._fronts.append(weakref.ref(route.front))
        return route


class _AsItIs:
    """Runs a function without a plan of its own; what it calls may be planned."""

    def __init__(self, function: Callable[..., Any], failure: str, model: nn.Module, bypasses: Bypasses) -> None:
        self._function, self._failure, self._model, self._bypasses = function, failure, model, bypasses

    def serves(self, args: Any, kwargs: Any) -> bool:  # noqa: ARG002
        """Whether it did so before: Dynamo is asked anew each time."""
        return False

    def prepare(self, reason: Exception | None, args: Any, kwargs: Any) -> None:
        """There is nothing to prepare."""

    def call(self, reason: Exception | None, args: Any, kwargs: Any) -> Any:
        """The function's result. It says so where a backward from there would run past all plans."""
        before = self._bypasses.count
        result = self._function(*args, **kwargs)
        if self._bypasses.count == before and reaches(result, self._model.parameters()):
            self._bypasses.say(self._failure if reason is None else f"{self._failure}: {reason}", stacklevel=5)
        return result


def watched_methods(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """For the body of a stand-in's class: the public methods of the model's own classes, each by way of `Methods`."""
    found: dict[str, Callable[..., Any]] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, nn.Module) or owner.__module__.startswith(_FRAMEWORKS) or owner is nn.Module:
            continue
        for name, function in vars(owner).items():
            own = isinstance(function, types.FunctionType) and name not in vars(nn.Module)
            if own and not name.startswith("_"):
                found[name] = _watched_method(name, function)
    return found


def _watched_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._fxckpt.methods.call(name, function, self, args, kwargs)

    return call
