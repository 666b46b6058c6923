"""What people write where a model, its inputs, a budget or an option is asked for, turned into Python's values."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Collection
from typing import Any

from fxckpt.calls import Call, read_call
from fxckpt.errors import BudgetError, FxckptError
from fxckpt.options import flags


def read_budget(text: str) -> str | float:
    """A budget as `optimize` takes it: "2GB" stays, "40%" and "0.4" are fractions of the plain peak.

    Raises:
        BudgetError: a fraction is outside (0, 1].
    """
    number, factor = (text[:-1], 0.01) if text.endswith("%") else (text, 1.0)
    if factor == 1.0 and "." not in number:
        return text
    try:
        fraction = float(number) * factor
    except ValueError:
        return text
    if not 0 < fraction <= 1:
        raise BudgetError(f"a fraction of the plain peak must be above 0 and at most 1 (100%), but it is {text}")
    return fraction


def read_option(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE; the value is read as JSON if it is that, else it is the text itself.

    >>> read_option("k=3"), read_option("keep=blocks.2"), read_option('keep=["a", "b"]')
    (('k', 3), ('keep', 'blocks.2'), ('keep', ['a', 'b']))

    Raises:
        FxckptError: there is no name or no value.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise FxckptError(f"{text!r} is no option: write NAME=VALUE, such as k=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_options(command: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """The options of `fxckpt.options.Options`, each as an argument; `None` where it is not given."""
    for name, flag in flags().items():
        if name in without:
            continue
        more: dict[str, Any] = {"action": "append"} if flag.repeated else {"choices": flag.choices or None}
        text = f"--{flag.name or name.replace('_', '-')}"
        command.add_argument(text, dest=name, metavar=flag.metavar, help=flag.help, **more)


def given_options(arguments: argparse.Namespace) -> Any:
    """Of the options those that were given, as keyword arguments of `optimize` or `plan`."""
    given = {name: value for name in flags() if (value := getattr(arguments, name, None)) is not None}
    return {name: dict(map(read_option, v)) if flags()[name].repeated else v for name, v in given.items()}


def load_model(text: str) -> Call:
    """Call MODULE:FUNCTION; the model, positional and keyword inputs.

    Raises:
        FxckptError: there is no such function, or it returns something else.
    """
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise FxckptError(f"{text!r} names no function: write MODULE:FUNCTION, such as train:build")
    if module_name.endswith(".py"):
        name = module_name.removesuffix(".py").replace(os.sep, ".")
        raise FxckptError(f"name the module, not its file: {name}:{function_name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise FxckptError(f"importing {module_name} failed: {error}") from error
        raise FxckptError(f"there is no module {error.name!r} here or on the path of Python") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise FxckptError(f"module {module_name!r} has no function {function_name!r}")
    return read_call(function(), text)
