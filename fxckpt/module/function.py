"""A function to be planned, such as one that computes a loss, as a module around the modules that it reaches."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fxckpt.errors import FxckptError

_DEEPEST = 5
_MOST_ITEMS = 1000


class FunctionModule(nn.Module):
    """Computes what a function computes. Its submodules are those that the function reaches, by the names it uses.

    Attributes:
        function: the function.
    """

    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        for name, module in _distinct(_reached(function, set())):
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, _: dict[int, Any]) -> nn.Module:
        raise FxckptError("a function can't be copied together with the modules that it calls")


class PlannedFunction:
    """What `fxckpt.optimize` returns for a function: it is called as the function is.

    Attributes:
        module: the function as an optimized module.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        functools.update_wrapper(self, function, updated=())
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, planned."""
        return self.module(*args, **kwargs)


def _reached(value: Any, seen: set[int], name: str = "model", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are found from a value, with names.

    What is too far away, or one of very many, is not found. It is planned all the same; reports just don't name it.
    """
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield name, value
        return
    for inner_name, inner in _parts(value, name):
        yield from _reached(inner, seen, inner_name, depth + 1)


def _parts(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    """What a value holds, with names."""
    if isinstance(value, PlannedFunction):
        return [(name, value.module)]
    if isinstance(value, functools.partial):
        return [(name, value.func), (name, list(value.args)), (name, value.keywords)]
    if isinstance(value, types.MethodType):
        return [("model", value.__self__), (name, value.__func__)]
    if isinstance(value, types.FunctionType):
        return _variables(value) if _is_users(value.__module__) else []
    if isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [(f"{name}_{key}", item) for key, item in itertools.islice(items, _MOST_ITEMS)]
    kind = type(value)
    if hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)) and _is_users(kind.__module__):
        return list(vars(value).items())
    return []


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads from around it: variables of enclosing functions, defaults, globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            yield name, cell.cell_contents
    defaults = function.__defaults__ or ()
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _global_names(code: types.CodeType) -> Iterator[str]:
    """The names that code looks up among globals, functions within it included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _is_users(module: str | None) -> bool:
    return (module or "").split(".")[0] not in ("torch", "builtins", "fxckpt")


def _distinct(found: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """The same under names that a module may have, each once."""
    taken = {"function", *dir(nn.Module)}
    for given, module in found:
        name, number = given.replace(".", "_") or "model", 1
        while name in taken:
            number += 1
            name = f"{given.replace('.', '_')}_{number}"
        taken.add(name)
        yield name, module
