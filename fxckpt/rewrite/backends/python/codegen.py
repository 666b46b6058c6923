"""Python code of emitted graphs: inputs in one list that is emptied, and gradients handed over in the middle.

A caller that passes tensors as arguments keeps them alive for the whole call, so the generated function takes a list,
unpacks and clears it; from then on every value dies at its last use. The backward function is a generator: it yields a
list of finished gradients at the end of each stage, and the caller empties that list before it goes on.

Frequent ops are called through torch's Python bindings, which take less than half the time of `torch.ops` to reach the
same kernel: a step makes hundreds of calls.
"""

from __future__ import annotations

import re

from torch import fx

from fxckpt.rewrite.emitted import deliver
from fxckpt.upstream.boxed import BoxedCodeGen

DIRECT: dict[str, str] = {
    "add.Tensor": "torch.add",
    "add.out": "torch.add",
    "addmm.default": "torch.addmm",
    "bmm.default": "torch.bmm",
    "convolution.default": "torch.convolution",
    "detach.default": "torch.detach",
    "div.Tensor": "torch.div",
    "expand.default": "torch.Tensor.expand",
    "mm.default": "torch.mm",
    "mul.Tensor": "torch.mul",
    "mul.out": "torch.mul",
    "native_layer_norm.default": "torch.native_layer_norm",
    "permute.default": "torch.permute",
    "relu.default": "torch.relu",
    "relu_.default": "torch.relu_",
    "select.int": "torch.select",
    "sub.Tensor": "torch.sub",
    "sum.dim_IntList": "torch.sum",
    "t.default": "torch.t",
    "transpose.int": "torch.transpose",
    "unsqueeze.default": "torch.unsqueeze",
    "view.default": "torch.Tensor.reshape",
}
"""Overloads of `torch.ops.aten`, and functions with the same arguments that dispatch to them.

A few kernels lay out their results differently from what torch tells while it traces (hardswish's backward): a view
that was traced may then need a copy, as `reshape` makes it.
"""

_OVERLOAD = re.compile(r"\btorch\.ops\.aten\.(\w+\.\w+)\(")


def compile_boxed(graph: fx.Graph, attributes: fx.GraphModule, name: str) -> fx.GraphModule:
    """A GraphModule of the graph with boxed code; constants come from `attributes`."""
    graph.set_codegen(BoxedCodeGen(_written_out))
    graph.lint()
    return fx.GraphModule(attributes, graph, class_name=name)


_CALL = re.compile(
    rf"(?P<indent>\s*)(?P<name>\w+) = {deliver.__module__.replace('.', '_')}_{deliver.__name__}\((?P<args>.*)\)"
    r"(;  (?P<dead>.*) = None)?\s*"
)


def _written_out(lines: list[str]) -> list[str]:
    """The generated body with deliveries yielded, and frequent ops called directly."""
    return [_OVERLOAD.sub(_direct, _yield_after(line)) for line in "".join(lines).splitlines(keepends=True)]


def _direct(call: re.Match[str]) -> str:
    function = DIRECT.get(call[1])
    return call[0] if function is None else f"{function}("


def _yield_after(line: str) -> str:
    """After `name = deliver(a, b);  a = b = name = None`, yield the list before it is dropped."""
    call = _CALL.fullmatch(line)
    if call is None:
        return line
    name, indent = call["name"], call["indent"]
    dead = [other for other in (call["dead"] or "").split(" = ") if other not in ("", name)]
    drop = f";  {' = '.join(dead)} = None" if dead else ""
    return f"{indent}{name} = [{call['args']}]{drop}\n{indent}yield {name};  {name} = None\n"
