"""Python's floats that forward reads: constants of a graph, or inputs of it once they have changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from fxckpt.upstream.operators import called_name


class Floats:
    """Python's floats that forward reads, over all conversions of a function.

    The first value of each is a constant of the graph. One that has changed becomes an input, unless something is
    computed with it that a tensor can't stand for, bit for bit.

    Attributes:
        values: the value that each had first, by where it is found.
        constant: those that stay constants.
        inputs: those that are inputs of the graph that is being made.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.constant: set[str] = set()
        self.inputs: set[str] = set()

    def is_input(self, name: str, value: float) -> bool:
        """Whether a float is to be an input."""
        changed = self.values.setdefault(name, value) != value
        if not changed or name in self.constant or not math.isfinite(value):
            return False
        self.inputs.add(name)
        return True

    def give_up(self) -> bool:
        """Let the present inputs be constants; whether there were any."""
        self.constant |= self.inputs
        return bool(self.inputs)


_EXACT = frozenset(
    {"mul", "add", "sub", "rsub", "neg", "truediv", "imul", "iadd", "isub", "itruediv", "div", "true_divide"}
)
"""Functions that compute the same with a tensor that holds one number as with the number."""


def is_exact(module: fx.GraphModule, inputs: Iterable[fx.Node]) -> bool:
    """Whether all that is computed with these inputs, floats as tensors, is what is computed with the floats."""
    pending, seen = list(inputs), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            name = called_name(user)
            if name == "autograd_function_apply":
                inner = [getattr(module, str(a.target)) for a in user.args[:2] if isinstance(a, fx.Node)]
                places = [n for n, arg in enumerate(user.args[2:]) if arg is node]
                if not all(_is_exact_inside(body, places) for body in inner):
                    return False
            elif user.op == "output" or name not in _EXACT or user.kwargs:
                return False
            elif not user.meta["example_value"].dim():
                pending.append(user)
            elif not user.meta["example_value"].is_floating_point() or any(
                not x.meta["example_value"].is_floating_point() for x in user.all_input_nodes
            ):
                return False
    return True


def _is_exact_inside(body: fx.GraphModule, places: list[int]) -> bool:
    """The same for the parts of an autograd.Function, whose backward may read what forward kept."""
    numbers = [n for n in body.graph.nodes if n.op == "placeholder" and not n.meta["example_value"].dim()]
    return bool(places) and is_exact(body, numbers)
