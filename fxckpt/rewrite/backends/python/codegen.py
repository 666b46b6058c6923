"""Python code of emitted graphs: inputs in one list that is emptied, and gradients handed over in the middle.

A caller that passes tensors as arguments keeps them alive for the whole call, so the generated function takes a list,
unpacks and clears it; from then on every value dies at its last use. The backward function is a generator: it yields a
list of finished gradients at the end of each stage, and the caller empties that list before it goes on.

Frequent ops are called through torch's Python bindings, which take less than half the time of `torch.ops` to reach the
same kernel: a step makes hundreds of calls.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from fxckpt.rewrite.emitted import deliver

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


class BoxedCodeGen(CodeGen):
    """Generates `forward(self, boxed)`, which takes its inputs in a list, empties it, and yields what is delivered."""

    def __init__(self) -> None:
        super().__init__()
        self._body_transformer = _written_out

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
