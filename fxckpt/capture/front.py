"""A graph that Dynamo made of a model, as a module to capture: its parameters and buffers have their paths again.

Dynamo's graph is a function of flat tensors, parameters among them. Here these stand where they stand in the model, in
modules that hold nothing else, so that whatever is said about the captured graph names the model's own paths. Each op
knows the module and the source line that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxckpt.capture.joint import JointGraph, capture
from fxckpt.capture.provenance import annotate, is_users
from fxckpt.capture.roles import Arrival, Input, InputKind
from fxckpt.errors import CaptureError
from fxckpt.upstream.checkpointed import say_bypassed
from fxckpt.upstream.dynamo import FUNCTION, TracedGraph, module_key
from fxckpt.upstream.hooks import buffers_of, children_of, parameters_of
from fxckpt.upstream.tensors import device_of, is_wrapper, memory_bytes, storage_key

_PART = re.compile(
    r"\._modules\['(?P<module>[^']+)'\]|\._parameters\['(?P<parameter>[^']+)'\]|\._buffers\['(?P<buffer>[^']+)'\]"
    r"|\.(?P<attribute>\w+)|\[(?P<item>[^]]+)\]"
)
_IN_DICT = re.compile(r"\.__dict__\['_(modules|parameters|buffers)'\]")
_OTHER_MEMORY = frozenset({"set_", "shallow_copy_data_", "set_data", "resize_", "swap_tensors"})
_NOT_NAMED = ("__self__", "__dict__", "__closure__", "cell_contents", "forward", "__func__")


class NewMemoryError(CaptureError):
    """Forward puts other memory behind a tensor, which no capture would repeat."""


@dataclass(frozen=True)
class Given:
    """Where one input of Dynamo's graph stands: its kind and its path, "" for arguments of the call."""

    kind: InputKind
    path: str


class Held(nn.Module):
    """Dynamo's graph as a module with nothing in it but the model's parameters and buffers, in their places."""

    def __init__(self, graph: fx.GraphModule, given: Sequence[Given]) -> None:
        super().__init__()
        self._fxckpt = graph, given  # a tuple: the graph is no submodule

    def forward(self, *arguments: torch.Tensor) -> Any:
        """The graph's outputs, for those of its inputs that are arguments."""
        graph, given = self._fxckpt
        left = iter(arguments)
        inputs = [next(left) if each.kind is InputKind.ARGUMENT else _find(self, each) for each in given]
        return fx.Interpreter(graph).run(*inputs)


class Lifted:
    """Dynamo's graph, with the model's paths for what it is given.

    Attributes:
        held: the graph as a module to capture.
        given: what each input of the graph is.
        arguments: indices of the inputs that are arguments of `held`.
        likely: which outputs a backward most likely starts from, as `capture` takes it.
        unused_bytes: what the model's parameters and buffers take that the graph does not read [B].
    """

    def __init__(self, graph: TracedGraph, model: nn.Module | None) -> None:
        """`model` is the one whose paths name modules, parameters and buffers.

        Raises:
            CaptureError: an input is no plain tensor, or the graph puts other memory behind one.
        """
        for source, example in zip(graph.sources, graph.examples, strict=True):
            _check(source, example)
        self._module, self._checkpointed = graph.module, graph.checkpointed
        known = {} if model is None else _places(model)
        self.given = tuple(
            _distinct([_given(s, x, known.get(id(x))) for s, x in zip(graph.sources, graph.examples, strict=True)])
        )
        self.arguments = tuple(i for i, given in enumerate(self.given) if given.kind is InputKind.ARGUMENT)
        self.likely = _likely(graph)
        self.unused_bytes = _unused_bytes(graph, model)
        paths: dict[str, str] = {}
        if model is not None:
            paths = {module_key(module): name for name, module in model.named_modules()}
        for node in graph.module.graph.nodes:
            if node.op != "placeholder" and getattr(node.target, "__name__", node.target) in _OTHER_MEMORY:
                raise NewMemoryError(
                    f"{_place(node, paths)[1] or 'forward'} puts other memory behind a tensor (by `.data =`, `set_` or "
                    "the like), which a plan can't. Write into the tensor instead: under torch.no_grad(), by copy_"
                )
            annotate(node, _place(node, paths))
        self.held = Held(graph.module, self.given)
        for given, example in zip(self.given, graph.examples, strict=True):
            if given.kind is not InputKind.ARGUMENT:
                _put(self.held, given, example)

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The graph's outputs for all its inputs, computed as eager computes them."""
        return self._module.forward(*inputs)

    def by_node(self, joint: JointGraph, inputs: Sequence[torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
        """The inputs of Dynamo's graph by the inputs of the captured one."""
        roles = joint.roles.inputs
        return {role.node: inputs[i] for role, i in zip(roles, self.order(roles), strict=True)}

    def order(self, inputs: Sequence[Input]) -> tuple[int, ...]:
        """For each input of the captured graph the index of Dynamo's input that it is."""
        places = {given: index for index, given in enumerate(self.given)}
        return tuple(
            self.arguments[i.index] if i.kind is InputKind.ARGUMENT else places[Given(i.kind, i.path)] for i in inputs
        )

    def capture(
        self,
        inputs: Sequence[torch.Tensor],
        tangents: Mapping[int, Arrival] | None = None,
        *,
        lowered: Callable[[torch.device], bool] | None = None,
    ) -> JointGraph:
        """Forward and backward as one graph, for these inputs of Dynamo's graph; `tangents` and, given the device,
        `lowered` as for `capture`."""
        if self._checkpointed:  # said here, since Dynamo keeps what is said while it compiles to itself
            say_bypassed()
        arguments = [inputs[index] for index in self.arguments]
        held = self.held
        return capture(
            held,
            arguments,
            forward=held.forward,
            tangents=tangents,
            likely=self.likely,
            annotates=True,
            lowered=lowered is not None and lowered(device_of((*held.parameters(), *arguments))),
        )


def _check(source: str, example: Any) -> None:
    what = "a number" if not isinstance(example, torch.Tensor) else None
    if isinstance(example, torch.Tensor) and (example.is_nested or example.layout is not torch.strided):
        what = f"a tensor of layout {str(example.layout).removeprefix('torch.')}"
    if isinstance(example, torch.Tensor) and is_wrapper(example):
        what = f"a {type(example).__name__}, a tensor made of others"
    if what is not None:
        raise CaptureError(
            f"the graph takes {what} ({source or 'of a nested tensor'}), which can't be planned. Give plain tensors: "
            "padded ones and a mask instead of nested ones"
        )


def _given(source: str, example: Any, known: Given | None) -> Given:
    source = _IN_DICT.sub(r"._\1", source)
    parts = [next((v, k) for k, v in match.groupdict().items() if v) for match in _PART.finditer(source)]
    names = [name.strip("'\"") for name, _ in parts if name not in _NOT_NAMED]
    if source.startswith("number: "):
        return Given(InputKind.ARGUMENT, "")
    kind = InputKind.ARGUMENT
    if isinstance(example, nn.Parameter) or (parts and parts[-1][1] == "parameter"):
        kind = InputKind.PARAMETER
    elif _is_held(source) or any(what in ("module", "buffer") for _, what in parts):
        kind = InputKind.BUFFER
    if kind is InputKind.ARGUMENT:
        return Given(kind, "")
    if known is not None:
        return known
    return Given(kind, ".".join(names[1:]) or "value")


def _places(model: nn.Module) -> dict[int, Given]:
    """Where the model's own parameters and buffers stand, by their ids."""
    places = {id(buffer): Given(InputKind.BUFFER, name) for name, buffer in model.named_buffers()}
    return places | {id(p): Given(InputKind.PARAMETER, name) for name, p in model.named_parameters()}


def _is_held(source: str) -> bool:
    """Whether a tensor is found elsewhere than in the arguments of the call: in the function, or in a global."""
    return source.startswith((FUNCTION, "G["))


def _distinct(given: list[Given]) -> list[Given]:
    """The same, no path twice and none within another."""
    taken: set[str] = set()
    found = []
    for each in given:
        path, number = each.path, 1
        while each.path and (path in taken or any(t.startswith(f"{path}.") or path.startswith(f"{t}.") for t in taken)):
            number += 1
            path = f"{each.path.replace('.', '_')}_{number}"  # at the top, where nothing is within it
        taken |= {path} - {""}
        found.append(Given(each.kind, path))
    return found


def _put(root: nn.Module, given: Given, tensor: torch.Tensor) -> None:
    *modules, name = given.path.split(".")
    for module in modules:
        root = children_of(root).setdefault(module, nn.Module())  # type: ignore[assignment]
    _place_of(root, given)[name] = tensor


def _find(root: nn.Module, given: Given) -> Any:
    *modules, name = given.path.split(".")
    for module in modules:
        root = children_of(root)[module]  # type: ignore[assignment]
    return _place_of(root, given)[name]


def _place_of(module: nn.Module, given: Given) -> dict[str, Any]:
    held: dict[str, Any] = parameters_of(module) if given.kind is InputKind.PARAMETER else buffers_of(module)
    return held


def _unused_bytes(graph: TracedGraph, model: nn.Module | None) -> int:
    if model is None:
        return 0
    read = {storage_key(x) for x in graph.examples}
    return memory_bytes(x for x in (*model.parameters(), *model.buffers()) if storage_key(x) not in read)


def _likely(graph: TracedGraph) -> frozenset[int] | None:
    """The number of the loss among the outputs that require grad."""
    if graph.loss is None:
        return None
    returned: Any = graph.module.graph.output_node().args[0]
    values = [node.meta.get("example_value") for node in returned]
    loss = values[graph.loss]
    if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.requires_grad:
        return None
    before = [x for x in values[: graph.loss] if isinstance(x, torch.Tensor) and x.requires_grad]
    return frozenset({len(before)})


def _place(node: fx.Node, paths: Mapping[str, str]) -> tuple[str, str]:
    """Module path and "file:line" of a node of Dynamo's."""
    modules = [paths.get(str(key).split("@")[0]) for key in node.meta.get("nn_module_stack") or ()]
    known = [path for path in modules if path is not None]
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [f"{file}:{line}" for file, line in lines if is_users(file)]
    return known[-1] if known else "", users[-1] if users else ""
