"""Python code of emitted graphs: inputs in one list that is emptied, and gradients handed over in the middle.

A caller that passes tensors as arguments keeps them alive for the whole call, so the generated function takes a list,
unpacks and clears it; from then on every value dies at its last use. The backward function is a generator: it yields a
list of finished gradients at the end of each stage, and the caller empties that list before it goes on. Where an
output's gradient is exchanged, it yields the parts of it, and is sent a list of what it goes on with.

Frequent ops are called through torch's Python bindings, which take half the time of `torch.ops` to reach the same
kernel; the others by what is behind `torch.ops`: a step makes hundreds of calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import fx

from fxckpt.rewrite.emitted import deliver
from fxckpt.upstream.boxed import BoxedCodeGen
from fxckpt.upstream.ops.dropout import dropout, dropout_backward

DIRECT: dict[str, str | Callable[..., Any]] = {
    "aten.add.Tensor": "torch.add",
    "aten.add.out": "torch.add",
    "aten.addmm.default": "torch.addmm",
    "aten.bmm.default": "torch.bmm",
    "aten.convolution.default": "torch.convolution",
    "aten.detach.default": "torch.detach",
    "aten.div.Tensor": "torch.div",
    "aten.div.out": "torch.div",
    "aten.expand.default": "torch.Tensor.expand",
    "aten.mm.default": "torch.mm",
    "aten.mul.Tensor": "torch.mul",
    "aten.mul.out": "torch.mul",
    "aten.native_layer_norm.default": "torch.native_layer_norm",
    "aten.permute.default": "torch.permute",
    "aten.relu.default": "torch.relu",
    "aten.relu_.default": "torch.relu_",
    "aten.select.int": "torch.select",
    "aten.sub.Tensor": "torch.sub",
    "aten.sub.out": "torch.sub",
    "aten.sum.dim_IntList": "torch.sum",
    "aten.t.default": "torch.t",
    "aten.transpose.int": "torch.transpose",
    "aten.unsqueeze.default": "torch.unsqueeze",
    "aten.view.default": "torch.Tensor.reshape",
    "fxckpt.dropout.default": dropout,
    "fxckpt.dropout_backward.default": dropout_backward,
}
"""Overloads of operators, and functions with the same arguments that dispatch to them, or that they dispatch to.

A few kernels lay out their results differently from what torch tells while it traces (hardswish's backward): a view
that was traced may then need a copy, as `reshape` makes it.
"""


def compile_boxed(graph: fx.Graph, attributes: fx.GraphModule, name: str) -> fx.GraphModule:
    """A GraphModule of the graph with boxed code; constants come from `attributes`."""
    graph.set_codegen(BoxedCodeGen(_yielding, DIRECT))
    graph.lint()
    return fx.GraphModule(attributes, graph, class_name=name)


_CALL = re.compile(
    rf"(?P<indent>\s*)(?P<name>\w+) = {deliver.__module__.replace('.', '_')}_{deliver.__name__}\((?P<args>.*)\)"
    r"(;  (?P<dead>.*) = None)?\s*"
)


_EXCHANGE = re.compile(
    r"(?P<indent>\s*)(?P<name>\w+) = torch\.ops\.fxckpt\.exchange\.default\(\[(?P<tangent>\w+)(?:, )?(?P<parts>[^]]*)\]"
    r".*?\)(;  (?P<dead>.*) = None)?\s*"
)


def _yielding(lines: list[str]) -> list[str]:
    """The generated body with deliveries and parts of gradients yielded."""
    return [_yield_parts(_yield_after(line)) for line in "".join(lines).splitlines(keepends=True)]


def _yield_after(line: str) -> str:
    """After `name = deliver(a, b);  a = b = name = None`, yield the list before it is dropped."""
    call = _CALL.fullmatch(line)
    if call is None:
        return line
    name, indent = call["name"], call["indent"]
    dead = [other for other in (call["dead"] or "").split(" = ") if other not in ("", name)]
    drop = f";  {' = '.join(dead)} = None" if dead else ""
    return f"{indent}{name} = [{call['args']}]{drop}\n{indent}yield {name};  {name} = None\n"


def _yield_parts(line: str) -> str:
    """Instead of `name = exchange([tangent, a, b], …);  a = b = None`, yield the list of parts for what is sent.

    The tangent is no part: autograd has it.
    """
    call = _EXCHANGE.fullmatch(line)
    if call is None:
        return line
    name, indent = call["name"], call["indent"]
    drop = f";  {call['dead']} = None" if call["dead"] else ""
    return f"{indent}{name} = [{call['parts']}]{drop}\n{indent}{name} = (yield {name}).pop()\n"
