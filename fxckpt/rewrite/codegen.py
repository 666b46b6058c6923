"""Python code of emitted graphs: inputs in one list that is emptied, and gradients handed over in the middle.

A caller that passes tensors as arguments keeps them alive for the whole call, so the generated function takes a list,
unpacks and clears it; from then on every value dies at its last use. The backward function is a generator: it yields a
list of finished gradients at the end of each stage, and the caller empties that list before it goes on.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen


def deliver(*gradients: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Hand finished gradients over: in generated code the result is yielded at once."""
    return list(gradients)


class BoxedCodeGen(CodeGen):
    """Generates `forward(self, boxed)` that takes all inputs in one list and empties it;

    Yields what `deliver` returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._body_transformer = _yield_deliveries

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """The function's first lines: signature, unpacking, clearing."""
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        unpack = f"    {', '.join(names)}, = boxed\n" if names else ""
        return f"def {self._func_name}(self, boxed){maybe_return_annotation}:\n{unpack}    boxed.clear()"


def compile_boxed(graph: fx.Graph, attributes: fx.GraphModule, name: str) -> fx.GraphModule:
    """A GraphModule of the graph with boxed code; constants come from `attributes`."""
    graph.set_codegen(BoxedCodeGen())
    graph.lint()
    return fx.GraphModule(attributes, graph, class_name=name)


_CALL = re.compile(
    rf"(?P<indent>\s*)(?P<name>\w+) = {deliver.__module__.replace('.', '_')}_{deliver.__name__}\((?P<args>.*)\)"
    r"(;  (?P<dead>.*) = None)?\s*"
)


def _yield_deliveries(lines: list[str]) -> list[str]:
    """After `name = deliver(a, b);  a = b = name = None`, yield the list before it is dropped."""
    return [_yield_after(line) for line in "".join(lines).splitlines(keepends=True)]


def _yield_after(line: str) -> str:
    call = _CALL.fullmatch(line)
    if call is None:
        return line
    name, indent = call["name"], call["indent"]
    dead = [other for other in (call["dead"] or "").split(" = ") if other not in ("", name)]
    drop = f";  {' = '.join(dead)} = None" if dead else ""
    return f"{indent}{name} = [{call['args']}]{drop}\n{indent}yield {name};  {name} = None\n"
