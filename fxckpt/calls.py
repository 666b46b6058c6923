"""A call of a model, as people's own functions return it: the model, and what to call it with."""

from __future__ import annotations

from typing import Any, NamedTuple

from fxckpt.errors import FxckptError

INPUTS = "a tuple of arguments, a dict of keyword arguments, or a pair (arguments, keyword arguments)"


class Call(NamedTuple):
    """A model with positional and keyword arguments."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_call(result: Any, function: str) -> Call:
    """The call in the (model, inputs) that a function of this name returned.

    Raises:
        FxckptError: it is something else, or the inputs are none of what `INPUTS` says.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise FxckptError(f"{function} must return (model, inputs), but it returned {type(result).__name__}")
    model, inputs = result
    if isinstance(inputs, dict):
        return Call(model, (), inputs)
    if isinstance(inputs, tuple):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return Call(model, *inputs)
        return Call(model, inputs, {})
    raise FxckptError(
        f"{function} must return (model, inputs), where inputs is {INPUTS}; it is {type(inputs).__name__}"
    )
