"""The module that stands in for the user's model: the same object in another class, with planned forward and backward.

The stand-in shares the model's whole `__dict__`, so parameters, buffers, submodules, flags and attributes are the same
in both, whichever of the two is changed. What fxckpt needs beside that lives in a slot, outside the dictionary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from fxckpt.module.methods import watched_methods
from fxckpt.module.planner import Planner
from fxckpt.module.refused import check_plannable
from fxckpt.options import Options
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
